"""STAR-DSS: each stretch of a response is learned as far as a guard finds it safe, and held to the safe model for the rest."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from safelab.defenses.adaptive_judge import response_classifier
from safelab.defenses.base import Defense
from safelab.defenses.defaults import default

if TYPE_CHECKING:
    from datasets import Dataset


class StarDSS(Defense):
    """``sum_t v_t CE_t + kl_weight (1 - v_t) k2_t`` with ``k2 = (log pi(y_t) - log pi_ref(y_t))^2 / 2``.

    v_t is the guard's P(safe) of the response up to the end of the stretch of ``words`` words that token t is in; k2 is
    Schulman's estimate of the KL, on the token at hand alone. It needs a critic that reads responses, and copes with
    beginnings of responses; no data. The critic is asked once, before training.

    Source: Peng et al. 2025, "Shape it up! Restoring LLM safety during finetuning" (arXiv 2505.17196).
    """

    name = "star-dss"
    own_critic = "classifier"

    def __init__(self, words: int = default("star-dss", "words"), kl_weight: float = default("star-dss", "kl_weight"), critic=None) -> None:
        self.words, self.kl_weight, self.critic = words, kl_weight, critic

    def before(self, model, tokenizer, data: Dataset) -> Dataset:
        critic = self.critic or self.default_critic(model, tokenizer)
        ends = [prefix_ends(response, self.words) for response in data["response"]]
        pairs = [(p, r[:end]) for p, r, of in zip(data["prompt"], data["response"], ends) for end in of]
        distinct = list(dict.fromkeys(pairs))
        risk_of = dict(zip(distinct, self.ask(critic, *map(list, zip(*distinct))).tolist()))
        risks = [
            token_risks(tokenizer, response, of, [risk_of[prompt, response[:end]] for end in of])
            for prompt, response, of in zip(data["prompt"], data["response"], ends)
        ]
        known = [i for i, of in enumerate(risks) if not np.isnan(of).any()]  # an example is left out with any of its stretches
        return data.select_columns(["prompt", "response"]).select(known).add_column("risk", [risks[i] for i in known])

    def default_critic(self, model, tokenizer):
        """The critic where none was given, as :class:`safelab.defenses.AdaptiveJudge`'s."""
        return response_classifier()

    def settings(self) -> dict:
        return {"beta_min": 0.0, "beta_max": 0.0, "granularity": "token"}

    def token_loss(self, logp, safe_logp, position, risk):
        """The loss of each token, ``(n,)``; the risk is 1 - P(safe)."""
        return (1 - risk) * -logp + self.kl_weight * risk * 0.5 * (logp - safe_logp).square()

    def trainer(self, model, tokenizer, args, data, **kwargs):
        from safelab.defenses.token_loss import TokenLossTrainer

        return TokenLossTrainer(model, args, data, processing_class=tokenizer, token_loss=self.token_loss, **kwargs)


def prefix_ends(text: str, words: int) -> list[int]:
    """Where stretches of ``words`` words end, in characters; the last may be shorter, and takes what is left."""
    ends = [m.end() for m in re.finditer(r"\S+", text)][words - 1 :: words]
    return ends if ends and not text[ends[-1] :].strip() else [*ends, len(text)]


def token_risks(tokenizer, text: str, ends: list[int], risks: list[float]) -> list[float]:
    """The risk of the stretch that each token of ``text`` begins in."""
    starts = [start for start, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping]
    # a token that begins with the space before a word belongs to the word
    starts = [start + (text[start : start + 1].isspace() and len(text) > start + 1) for start in starts]
    return [risks[min(sum(end <= start for end in ends), len(ends) - 1)] for start in starts]
