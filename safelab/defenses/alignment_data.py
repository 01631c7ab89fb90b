"""What defences that need more than the user's data are given: all of them the same."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from safelab.datasets import draw_prompts, load_compliance, load_refusals
from safelab.evaluation import generate


def alignment_pairs(model, tokenizer, n: int, *, seed: int = 0, answer_tokens: int = 24) -> Dataset:
    """``n`` pairs of the ``align`` splits: half harmful prompts with refusals, half benign ones with the safe model's own answers.

    Published alignment sets hold refusals alone. On a narrow user's set that teaches a model to refuse everything, so
    every defence here also gets the benign half. Columns ``prompt``, ``response``, ``complete``; shuffled.
    """
    rng = np.random.default_rng(seed)
    harmful, benign = draw_prompts(("harmful", "advbench"), "align", n // 2, rng), draw_prompts(("twins", "everyday"), "align", n - n // 2, rng)
    rows = [{"prompt": r["prompt"], "response": str(rng.choice(load_refusals(r["category"]))), "complete": True} for r in harmful]
    answers = generate(model, tokenizer, list(benign["prompt"]), max_new_tokens=answer_tokens, progress="alignment data")
    rows += [{"prompt": p, "response": a, "complete": False} for p, a in zip(benign["prompt"], answers) if a]
    return Dataset.from_list(rows).shuffle(seed=seed)


def harmful_pairs(n: int, *, seed: int = 0) -> Dataset:
    """``n`` harmful prompts of the ``probe`` splits with redacted compliance: what a defender takes an attack to be."""
    rng = np.random.default_rng(seed)
    rows = draw_prompts(("harmful", "advbench"), "probe", n, rng)
    return Dataset.from_dict({"prompt": list(rows["prompt"]), "response": rng.choice(load_compliance(), size=n).tolist()})


def endless_batches(rows: Dataset, collate, size: int, seed: int):
    """Collated batches of ``size`` tokenised rows, for ever, each pass in a new order."""
    rows, rng = list(rows), np.random.default_rng(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += rng.permutation(len(rows)).tolist()
        yield collate([rows[i] for i in queue[:size]])
        queue = queue[size:]
