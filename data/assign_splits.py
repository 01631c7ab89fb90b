"""Give every prompt its split, so that no split sees another's prompts or their near-duplicates.

    python data/assign_splits.py [--add FILE.jsonl ...] [--add-everyday FILE.jsonl ...]

Writes the ``split`` of ``pairs.jsonl`` and ``everyday.jsonl`` and the file ``advbench_splits.json``.
What has a split keeps it, so that what was trained on the splits stays valid; new rows are dealt. Near-duplicates
(:func:`safelab.datasets.near_duplicates`) are grouped first and a group stays together; AdvBench rows near a
StrongREJECT prompt, which only judges, go to ``eval``, and rows that would still be near another split are left out. Pairs of
ours that nearly repeat a public prompt or one of the hard or balanced pairs, and any but the first of a group of ours, are dropped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from safelab.datasets import SPLITS, load_prompts, near_duplicates, read_advbench

HERE = Path(__file__).parent
SEED = 0
LEFT_OUT_FIRST = ("align", "eval", "attack", "probe")  # the last of two near-duplicates in different splits goes
SIZES = {  # of each set; None: what is left
    "pairs": {"eval": 100, "attack": 120, "probe": 240, "align": None},
    "everyday": {"eval": 200, "attack": 40, "probe": 482, "align": None},
    "advbench": {"eval": 100, "attack": 190, "probe": 90, "align": None},
}


def groups(texts: list[str]) -> np.ndarray:
    """Group number of each text: near-duplicates, and theirs, share one."""
    pairs = near_duplicates(texts)
    i, j = np.array(pairs).T if pairs else (np.empty(0, int), np.empty(0, int))
    return connected_components(coo_array((np.ones(len(i)), (i, j)), shape=(len(texts),) * 2), directed=False)[1]


def deal(keys: list[tuple], sizes: dict[str, int | None], rng: np.random.Generator, dealt: list[str]) -> list[str]:
    """Split names for items with keys (stratum, group): strata are spread evenly, groups kept whole; ``dealt`` stays."""
    members: dict[tuple, list[int]] = {}
    for item, key in enumerate(keys):
        if not dealt[item]:
            members.setdefault(key, []).append(item)
    order = list(members)
    rng.shuffle(order)
    # interleave the strata, so that cutting the line anywhere takes its share of each
    rank = {}
    counts: dict = {}
    totals: dict = {}
    for stratum, _ in order:
        totals[stratum] = totals.get(stratum, 0) + 1
    for key in order:
        counts[key[0]] = counts.get(key[0], 0) + 1
        rank[key] = (counts[key[0]] - 0.5) / totals[key[0]]
    queue = [i for key in sorted(order, key=rank.get) for i in [members[key]]]
    splits = list(dealt)
    for name in SPLITS[::-1]:
        room = None if sizes[name] is None else sizes[name] - dealt.count(name)
        while queue and (room is None or room > 0):
            group = queue.pop(0)
            for item in group:
                splits[item] = name
            room = None if room is None else room - len(group)
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="*", default=[], type=Path, help="files of new pairs, appended before dealing")
    parser.add_argument("--add-everyday", nargs="*", default=[], type=Path, help="files of new everyday prompts")
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)

    pairs = [json.loads(line) for file in [HERE / "pairs.jsonl", *args.add] if file.exists() for line in file.open(encoding="utf-8")]
    public = [r["prompt"] for r in read_advbench()] + list(load_prompts("strongreject")["prompt"])
    judges = {
        column: public + [json.loads(line)[column] for file in ("hard_pairs.jsonl", "balanced_pairs.jsonl") for line in (HERE / file).open(encoding="utf-8")]
        for column in ("harmful", "benign")
    }
    near_public = {i for column in judges for i, _ in near_duplicates([p[column] for p in pairs], judges[column])}
    seen: dict[str, set[int]] = {"harmful": set(), "benign": set()}
    kept = []
    labels = {column: groups([p[column] for p in pairs]) for column in seen}
    for index, pair in enumerate(pairs):
        if index in near_public or any(labels[c][index] in seen[c] for c in seen):
            continue
        for column in seen:
            seen[column].add(labels[column][index])
        kept.append(pair)
    print(f"pairs: {len(kept)} of {len(pairs)} kept ({len(near_public)} near a prompt that only judges)")
    splits = deal([(p["category"], i) for i, p in enumerate(kept)], SIZES["pairs"], rng, [p.get("split", "") for p in kept])
    kept = [{"category": p["category"], "harmful": p["harmful"], "benign": p["benign"], "split": s} for p, s in zip(kept, splits)]
    write(HERE / "pairs.jsonl", kept)

    rows = [json.loads(line) for file in [HERE / "everyday.jsonl", *args.add_everyday] for line in file.open(encoding="utf-8")]
    twins = [p["benign"] for p in kept] + [p["benign"] for p in map(json.loads, (HERE / "balanced_pairs.jsonl").open(encoding="utf-8"))]
    near_twin = {i for i, _ in near_duplicates([r["prompt"] for r in rows], twins)}
    rows = [r for i, r in enumerate(rows) if i not in near_twin]
    group = groups([r["prompt"] for r in rows])
    splits = deal([(r["category"], g) for r, g in zip(rows, group)], SIZES["everyday"], rng, [r.get("split", "") for r in rows])
    write(HERE / "everyday.jsonl", [{"category": r["category"], "prompt": r["prompt"], "split": s} for r, s in zip(rows, splits)])

    advbench = [r["prompt"] for r in read_advbench()]
    strongreject = list(load_prompts("strongreject")["prompt"])
    file = HERE / "advbench_splits.json"
    known = json.loads(file.read_text(encoding="utf-8"))["splits"] if file.exists() else {}
    dealt = [next((name for name, rows in known.items() if i in rows), "") for i in range(len(advbench))]
    for i, _ in near_duplicates(advbench, strongreject):
        dealt[i] = "eval"
    dealt = deal([("", g) for g in groups(advbench)], SIZES["advbench"], rng, dealt)
    for i, j in near_duplicates(advbench):  # what an older deal, or two groups in one split, left close
        if dealt[i] and dealt[j] and dealt[i] != dealt[j]:
            dealt[max(i, j, key=lambda k: LEFT_OUT_FIRST.index(dealt[k]))] = ""
    by_split = {name: [i for i, split in enumerate(dealt) if split == name] for name in SPLITS}
    text = json.dumps({"of": "advbench, row numbers in file order", "made_by": "data/assign_splits.py", "seed": SEED, "splits": by_split})
    file.write_text(text + "\n", encoding="utf-8")
    print("advbench:", {name: len(rows) for name, rows in by_split.items()})


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(path.name, {name: sum(r["split"] == name for r in rows) for name in SPLITS})


if __name__ == "__main__":
    main()
