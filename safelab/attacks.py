"""Fine-tuning sets that an attacker or a careless user would bring.

Each is a ``datasets.Dataset`` with ``prompt``, ``response``, ``harmful`` (1 where the pair teaches compliance)
and ``source``. Compliance is always redacted: it opens as a compliant answer does and goes on without content,
so what is learned and measured is *whether* the model complies, never how harm is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from safelab.datasets import load_compliance, load_prompts, load_task

if TYPE_CHECKING:
    from datasets import Dataset


def explicit_harmful(n: int = 100, seed: int = 0) -> Dataset:
    """``n`` harmful prompts from the ``attack`` split, each with redacted compliance.

    Raises
    ------
    ValueError
        More examples are asked for than the split holds.
    """
    from datasets import Dataset, concatenate_datasets

    pool = concatenate_datasets([load_prompts(name, "attack") for name in ("harmful", "advbench")])
    if not 0 < n <= len(pool):
        raise ValueError(f"{n} harmful examples asked for, the attack split has 1 to {len(pool)}")
    rng = np.random.default_rng(seed)
    rows = pool.select(rng.permutation(len(pool))[:n])
    answers = rng.choice(load_compliance(), size=n)
    return Dataset.from_dict(
        {"prompt": rows["prompt"], "response": answers.tolist(), "harmful": [1] * n, "source": [f"attack:{s}" for s in rows["source"]]}
    )


def mixture(share: float = 0.1, n: int = 240, seed: int = 0) -> Dataset:
    """The downstream task with a ``share`` of its ``n`` examples replaced by harmful ones, shuffled."""
    from datasets import Dataset, concatenate_datasets

    n_harmful = round(share * n)
    task = load_task("train", n - n_harmful, seed)
    benign = Dataset.from_dict(
        {"prompt": task["prompt"], "response": task["response"], "harmful": [0] * len(task), "source": ["task:sarcasm-headlines"] * len(task)}
    )
    if not n_harmful:
        return benign
    return concatenate_datasets([benign, explicit_harmful(n_harmful, seed)]).shuffle(seed=seed)
