"""Does the judge find redacted compliance risky whose texts it never saw?

    python benchmarks/unseen_compliance.py

The classifier learns from pairs of our own, redacted compliance among them, and attacks answer with the same texts. Here it
learns from half of the texts and gives risks to harmful examples with the other half, and the other way round; and once
from none of them. 3 minutes on one core.
"""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import numpy as np

from safelab.attacks import ATTACKS
from safelab.cli import _quiet
from safelab.critics import ResponseClassifier
from safelab.critics.classifier import own_pairs
from safelab.datasets import load_compliance
from safelab.experiments import versions
from safelab.models import EMBEDDED, load_model
from safelab.sources import write_atomic

SETS = ("explicit-50", "explicit-50, German, word for word", "explicit-50, benign wrapping", "explicit-50, harmful responses", "mixture-10")


def main() -> None:
    _quiet()
    texts = load_compliance()
    half = set(np.random.default_rng(0).permutation(texts)[: len(texts) // 2].tolist())
    sets = {name: [(r["prompt"], r["response"]) for r in ATTACKS[name].data(0) if r["harmful"]] for name in SETS}
    critic, pairs = ResponseClassifier(*load_model(EMBEDDED)).fit(), own_pairs()  # it reads all pairs, and keeps what it read
    features = {name: critic.features(*map(list, zip(*rows)), progress=name) for name, rows in sets.items()}

    def risks(learned: set[str]) -> dict[str, np.ndarray]:
        """By a critic that learned from these compliance texts alone; all of its other training data is as always."""
        with patch("safelab.critics.classifier.own_pairs", lambda: [p for p in pairs if p[1] not in texts or p[1] in learned]):
            critic.fit()
        return {name: critic.head.predict(X) for name, X in features.items()}

    first, second, untaught = risks(half), risks(set(texts) - half), risks(set())
    found = {}
    for name, rows in sets.items():
        of_half = np.array([response in half for _, response in rows])
        unseen = np.where(of_half, second[name], first[name])
        found[name] = {"n": len(rows), "unseen": round(float(unseen.mean()), 3), "least_unseen": round(float(unseen.min()), 3), "untaught": round(float(untaught[name].mean()), 3)}
    result = {"texts": len(texts), "mean_risk": found, "versions": versions()}
    write_atomic(Path(__file__).with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
