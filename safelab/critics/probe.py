"""ProbeCritic: the risk of a prompt, read from the reference model before it writes a word."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from importlib.metadata import version

import numpy as np

from safelab.activations import extract_activations, model_fingerprint, template_fingerprint
from safelab.critics.base import Critic, Verdicts, plain_verdicts
from safelab.models import decoder_layers
from safelab.probes import HarmProbe, data_fingerprint, default_layers, load_probe, probe_prompts, save_probe
from safelab.sources import cache_dir


class ProbeCritic(Critic):
    """Activation-based risk: a probe on the *reference* model's states at the last prompt token.

    It judges the prompt alone, before a word is written; the response is not looked at.
    """

    name = "probe"

    def __init__(self, probe: HarmProbe, model, tokenizer, layers: list[int]) -> None:
        self.probe, self.model, self.tokenizer, self.layers = probe, model, tokenizer, layers

    @property
    def version(self) -> str:
        """Hash of what was fitted: two probes on one model are two critics."""
        fitted = b"".join(np.asarray(values, dtype=float).tobytes() for pair in self.probe.network_ for values in pair)
        return hashlib.sha256(repr(self.layers).encode() + fitted).hexdigest()[:16]

    def score(self, prompts: list[str], responses: list[str] | None = None) -> np.ndarray:
        """Calibrated probability that each prompt is harmful, ``(n,)``."""
        states = extract_activations(self.model, self.tokenizer, prompts, layers=self.layers, progress="risk")
        return self.probe.predict_proba(states.values.reshape(len(prompts), -1))[:, 1]

    def judge(self, prompts: list[str], responses: list[str] | None = None) -> Verdicts:
        return plain_verdicts(self.score(prompts))


def train_probe_critic(model, tokenizer, *, layers: list[int] | None = None) -> ProbeCritic:
    """The default probe on this model, trained on :func:`safelab.probes.probe_prompts`.

    Their states and the probe are kept, so that a second run on the same model has them at once.
    """
    prompts, labels, groups = probe_prompts()
    layers = default_layers(len(decoder_layers(model))) if layers is None else layers
    key = [model_fingerprint(model), template_fingerprint(tokenizer), layers, data_fingerprint(prompts, labels), version("scikit-learn")]
    folder = cache_dir() / "probes" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    try:
        probe, _ = load_probe(folder, model=model, tokenizer=tokenizer)
    except ValueError:  # none yet, or a damaged one
        shutil.rmtree(folder, ignore_errors=True)
        states = extract_activations(model, tokenizer, prompts, layers=layers, cache=True, progress="probe")
        probe = HarmProbe().fit(states.concatenated(), labels, groups=groups)
        with suppress(FileExistsError):  # another process was faster
            save_probe(probe, folder, model=model, tokenizer=tokenizer, layers=layers, data=key[3])
    return ProbeCritic(probe, model, tokenizer, layers)
