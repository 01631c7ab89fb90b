"""Out of new pairs, set aside those whose label the wording does not give away: ``balanced_pairs.jsonl``.

    python data/select_balanced.py FILE.jsonl ... --rest REST.jsonl

Each new pair is judged by a bag of words (TF-IDF, logistic regression) trained on all the other pairs, out of fold; its margin
is the score of the harmful prompt minus that of its twin. The pairs with the smallest margins are set aside, to judge only,
as adversarial filtering does (Le Bras et al. 2020). No language model takes part in the choice. The others go to REST,
for ``assign_splits.py --add``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline

from safelab.datasets import load_prompts, near_duplicates, read_advbench

HERE = Path(__file__).parent
KEPT = 120
COLUMNS = ("harmful", "benign")


def text_scores(pairs: list[dict], repeats: int = 3, folds: int = 10) -> np.ndarray:
    """Out-of-fold log-odds of harm from wording alone, ``(pairs, 2)``: harmful prompt, twin."""
    texts = np.array([[p[c] for c in COLUMNS] for p in pairs])
    scores = np.zeros(texts.shape)
    for seed in range(repeats):
        for train, test in KFold(folds, shuffle=True, random_state=seed).split(texts):
            words = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=2000))
            words.fit(texts[train].ravel(), np.tile([1, 0], len(train)))
            scores[test] += words.decision_function(texts[test].ravel()).reshape(-1, 2) / repeats
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rest", required=True, type=Path)
    args = parser.parse_args()
    old = read(HERE / "pairs.jsonl")
    new = [pair for file in args.files for pair in read(file)]
    known = {c: [p[c] for p in old + read(HERE / "hard_pairs.jsonl")] for c in COLUMNS}
    public = [r["prompt"] for r in read_advbench()] + list(load_prompts("strongreject")["prompt"])
    near = {i for c in COLUMNS for i, _ in near_duplicates([p[c] for p in new], known[c] + public)}
    near |= {j for c in COLUMNS for _, j in near_duplicates([p[c] for p in new])}
    near |= {i for i, _ in near_duplicates([p["benign"] for p in new], list(load_prompts("everyday")["prompt"]))}
    new = [pair for i, pair in enumerate(new) if i not in near]
    scores = text_scores(old + new)[len(old) :]
    order = np.argsort(scores[:, 0] - scores[:, 1])
    chosen = sorted(order[:KEPT].tolist())
    print(f"{len(near)} near-duplicates dropped; AUROC of wording: {auroc(scores):.2f} over {len(new)} new pairs, {auroc(scores[chosen]):.2f} over the {KEPT} set aside")
    write(HERE / "balanced_pairs.jsonl", [{**{k: new[i][k] for k in ("category", *COLUMNS)}, "split": "eval"} for i in chosen])
    write(args.rest, [pair for i, pair in enumerate(new) if i not in set(chosen)])


def auroc(scores: np.ndarray) -> float:
    return float(roc_auc_score(np.tile([1, 0], len(scores)), scores.ravel()))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(path.name, len(rows))


if __name__ == "__main__":
    main()
