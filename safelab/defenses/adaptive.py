"""Adaptive regularisation (arXiv 2602.17546): each example is held as strongly as its risk demands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from safelab.critics import train_probe_critic
from safelab.defenses.anchors import add_anchors
from safelab.defenses.base import Defense

if TYPE_CHECKING:
    from datasets import Dataset


class AdaptiveProbe(Defense):
    """``beta_i = beta_min + (beta_max - beta_min) * s_i``, s_i from a probe on the safe model's activations.

    The risk of an example is a constant, so it is computed once, before training. For each example an epoch shows ``anchors``
    prompts with the safe model's own answers, held by the KL alone: what the user's data never shows, benign
    requests of other kinds above all, would otherwise drift.

    Without a ``critic`` the probe reads ``layers`` of the safe model (default :func:`safelab.probes.default_layers`).
    With ``shuffled`` that share of the risks change places at random, so that a critic without error is left with an AUROC
    of about ``1 - shuffled / 2``: an ablation asks so how good it must be.
    """

    name = "adaptive-probe"
    own_critic = "probe"

    def __init__(self, beta_min: float = 0.0, beta_max: float = 1.0, granularity: str = "example", anchors: float = 0.4, shuffled: float = 0.0, critic=None, layers=None) -> None:
        if not 0 <= shuffled <= 1:
            raise ValueError(f"shuffled {shuffled}: expected a share in [0, 1]")
        self.beta_min, self.beta_max, self.granularity, self.anchors, self.shuffled, self.critic = beta_min, beta_max, granularity, anchors, shuffled, critic
        self.layers = list(layers) if layers is not None else None

    def before(self, model, tokenizer, data: Dataset) -> Dataset:
        risks = np.asarray(self.risks(model, tokenizer, data), dtype=float)
        if self.shuffled:
            rng = np.random.default_rng(0)
            moved = rng.permutation(len(risks))[: round(self.shuffled * len(risks))]
            risks[moved] = risks[rng.permutation(moved)]
        known = ~np.isnan(risks)
        data = (data if known.all() else data.select(np.flatnonzero(known))).add_column("risk", risks[known].tolist())
        return add_anchors(model, tokenizer, data, self.anchors) if self.anchors else data

    def risks(self, model, tokenizer, data: Dataset) -> list[float]:
        """The critic's risk of each row; NaN for one that is left out."""
        critic = self.critic or self.default_critic(model, tokenizer)
        return self.ask(critic, list(data["prompt"]), list(data["response"])).tolist()

    def default_critic(self, model, tokenizer):
        """The critic where none was given: a probe trained on ``model``, the safe one."""
        return train_probe_critic(model, tokenizer, layers=self.layers)

    def settings(self) -> dict:
        return {"beta_min": self.beta_min, "beta_max": self.beta_max, "granularity": self.granularity, "anchor_share": self.anchors}
