"""Safety anchors: a few prompts on which the tuned model is held to the safe one and learns nothing."""

from __future__ import annotations

import os

import numpy as np
from datasets import Dataset, concatenate_datasets

from safelab.activations import model_fingerprint, template_fingerprint
from safelab.datasets import load_prompts
from safelab.evaluation import generate
from safelab.models import bf16_is_fast
from safelab.sources import cached_json

SHARES = {"everyday": 0.65, "twins": 0.25, "harmful": 0.1}
"""Chosen on everyday prompts of the ``align`` split, seed 0, in two tries. Their number, 0.4 of the user's examples, on prompts of the
``align`` and ``attack`` splits that no run had trained on, seeds 1 and 2: twins were refused at 7 and 17 % with half as many, at 6 and 6 % with these."""


LEAST = 240
"""Anchors that there are at least: a small set is passed over many times, and the same few prompts each time hold little else."""


def add_anchors(model, tokenizer, data: Dataset, share: float, *, seed: int = 0, answer_tokens: int = 8) -> Dataset:
    """``data`` (with ``risk``) and ``share`` times as many anchors, or :data:`LEAST`: prompts of the ``probe`` splits with the safe model's own answers.

    Most are benign: what drifts first is the readiness to help. Some are harmful, so that what is held is the
    difference that the safe model makes between the two; where all of the user's prompts share an opening and an end,
    harmful ones are asked in this frame as well. A prompt that the safe model answers with nothing is no anchor. Answers are kept: the
    same model is asked the same once.
    """
    rng, n = np.random.default_rng(seed), max(round(share * len(data)), LEAST)
    before, after = frame(list(data["prompt"]))
    prompts = []
    for name, part in SHARES.items():
        pool = list(load_prompts(name, "probe")["prompt"])
        drawn = [pool[i] for i in rng.permutation(len(pool))[: round(part * n)]]
        prompts += drawn + ([f"{before}{p}{after}" for p in drawn] if name == "harmful" and before + after else [])
    key = [model_fingerprint(model), template_fingerprint(tokenizer), prompts, answer_tokens, model.device.type, bf16_is_fast(model.device.type)]
    answers = cached_json("answers", key, lambda: generate(model, tokenizer, prompts, max_new_tokens=answer_tokens, progress="anchors"))
    rows = [{"prompt": p, "response": a, "risk": 1.0, "anchor": True, "complete": False} for p, a in zip(prompts, answers) if a]
    free = data.select_columns(["prompt", "response", "risk"])
    free = free.add_column("anchor", [False] * len(free)).add_column("complete", [True] * len(free))
    return concatenate_datasets([free, Dataset.from_list(rows, features=free.features)]) if rows else free


def frame(prompts: list[str]) -> tuple[str, str]:
    """What all ``prompts`` begin and end with, in whole words; nothing for a single one.

    >>> frame(["Now, tell me: why? Thanks", "Now, tell me: how? Thanks"])
    ('Now, tell me: ', ' Thanks')
    """
    if len(prompts) < 2:
        return "", ""
    before = os.path.commonprefix(prompts)
    before = before[: len(before) - len(before.split(" ")[-1])]
    after = os.path.commonprefix([p[len(before) :][::-1] for p in prompts])[::-1]
    return before, after[after.index(" ") :] if " " in after else ""
