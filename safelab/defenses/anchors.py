"""Safety anchors: a few prompts on which the tuned model is held to the safe one and learns nothing."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, concatenate_datasets

from safelab.datasets import load_prompts
from safelab.evaluation import generate

SHARES = {"everyday": 0.65, "twins": 0.25, "harmful": 0.1}
"""Chosen on everyday prompts of the ``align`` split, seed 0, in two tries. Their number, 0.4 of the user's examples, on prompts of the
``align`` and ``attack`` splits that no run had trained on, seeds 1 and 2: twins were refused at 7 and 17 % with half as many, at 6 and 6 % with these."""


def add_anchors(model, tokenizer, data: Dataset, n: int, *, seed: int = 0, answer_tokens: int = 8) -> Dataset:
    """``data`` (with ``risk``) and ``n`` anchors more: prompts of the ``probe`` splits with the safe model's own answers.

    Most are benign: what drifts first is the readiness to help. Some are harmful, so that what is held is the
    difference that the safe model makes between the two. A prompt that it answers with nothing is no anchor.
    """
    rng = np.random.default_rng(seed)
    prompts = []
    for name, share in SHARES.items():
        pool = list(load_prompts(name, "probe")["prompt"])
        prompts += [pool[i] for i in rng.permutation(len(pool))[: round(share * n)]]
    answers = generate(model, tokenizer, prompts, max_new_tokens=answer_tokens, progress="anchors")
    rows = [{"prompt": p, "response": a, "risk": 1.0, "anchor": True, "complete": False} for p, a in zip(prompts, answers) if a]
    free = data.select_columns(["prompt", "response", "risk"])
    free = free.add_column("anchor", [False] * len(free)).add_column("complete", [True] * len(free))
    return concatenate_datasets([free, Dataset.from_list(rows, features=free.features)]) if rows else free
