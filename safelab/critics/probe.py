"""ProbeCritic: the risk of a prompt, read from the reference model before it writes a word."""

from __future__ import annotations

import numpy as np

from safelab.activations import Activations, extract_activations
from safelab.critics.base import Critic, Verdicts, plain_verdicts
from safelab.models import decoder_layers
from safelab.probes import HarmProbe, default_layers, probe_prompts


class ProbeCritic(Critic):
    """Activation-based risk: a probe on the *reference* model's states at the last prompt token.

    It judges the prompt alone, before a word is written; the response is not looked at.
    """

    name = "probe"

    def __init__(self, probe: HarmProbe, model, tokenizer, layers: list[int]) -> None:
        self.probe, self.model, self.tokenizer, self.layers = probe, model, tokenizer, layers

    def score(self, prompts: list[str], responses: list[str] | None = None) -> np.ndarray:
        """Calibrated probability that each prompt is harmful, ``(n,)``."""
        states = extract_activations(self.model, self.tokenizer, prompts, layers=self.layers, progress="risk")
        return self.probe.predict_proba(states.values.reshape(len(prompts), -1))[:, 1]

    def judge(self, prompts: list[str], responses: list[str] | None = None) -> Verdicts:
        return plain_verdicts(self.score(prompts))


def train_probe_critic(model, tokenizer, *, layers: list[int] | None = None, states: Activations | None = None) -> ProbeCritic:
    """The default probe on this model, trained on :func:`safelab.probes.probe_prompts`, whose states are kept; ``states`` are those, if they are at hand."""
    prompts, labels, groups = probe_prompts()
    layers = default_layers(len(decoder_layers(model))) if layers is None else layers
    states = extract_activations(model, tokenizer, prompts, layers=layers, cache=True, progress="probe") if states is None else states.select(layers)
    probe = HarmProbe().fit(states.concatenated(), labels, groups=groups)
    return ProbeCritic(probe, model, tokenizer, layers)
