"""A name or a file -> ``datasets.Dataset`` with fixed columns and fixed, disjoint splits.

Prompt sets have the columns ``prompt``, ``label`` (1 harmful, 0 benign), ``category`` and ``source``;
pair sets also ``response``. Splits: ``align`` makes the safe model, ``probe`` trains probes, ``attack``
is what fine-tuning sets draw from, ``eval`` judges. No prompt is in two of them, nor a near-duplicate.
"""

from __future__ import annotations

import csv
import json
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safelab.sources import data_dir, fetch_members

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

SPLITS = ("align", "probe", "attack", "eval")
TASK_SYSTEM = "Is this headline serious or sarcastic? Answer with one word."
TASK_ANSWERS = ("serious", "sarcastic")


class DataError(ValueError):
    """A data file or name that cannot be used; the message names file, line and what was expected."""


# ---------------------------------------------------------------------------------- registered sets


class _Registered(NamedTuple):
    load: object  # () -> list of rows, each with prompt, label, category, source, split
    splits: tuple[str, ...]


def load_prompts(name: str | Path, split: str | None = None, *, label: int | None = None) -> Dataset:
    """A registered prompt set, or a .jsonl, .csv or .txt file of prompts.

    Parameters
    ----------
    name
        ``"harmful"`` and ``"twins"`` (ours: each harmful prompt has a benign twin that shares its words),
        ``"hard-harmful"`` and ``"hard-twins"`` (ours: pairs that hang on a single
        word), ``"balanced-harmful"`` and ``"balanced-twins"`` (ours: pairs that a bag of words cannot tell apart),
        ``"everyday"`` (ours, benign), ``"advbench"``, ``"strongreject"`` (both harmful, public), or a path.
    split
        One of :data:`SPLITS`, or None for all rows. StrongREJECT, the hard and the balanced pairs only have ``eval``; files have none.
    label
        Label for a file's rows that bring none.

    Raises
    ------
    DataError
        Unknown name or split, or a file that is empty or malformed.
    """
    from datasets import Dataset

    if str(name) not in PROMPT_SETS:
        if split is not None:
            raise DataError(f"{name}: a file has no splits; {split!r} was asked for")
        return Dataset.from_list(read_prompt_file(name, label=label))
    registered = PROMPT_SETS[str(name)]
    if split is not None and split not in registered.splits:
        raise DataError(f"{name} has no split {split!r}: it has {', '.join(registered.splits)}")
    rows = [row for row in registered.load() if split is None or row["split"] == split]
    return Dataset.from_list(rows)


def draw_prompts(names: tuple[str, ...], split: str, n: int, rng: np.random.Generator) -> Dataset:
    """``n`` rows of a split of registered prompt sets taken together, in random order.

    Raises
    ------
    ValueError
        None are asked for, or more than there are.
    """
    from datasets import concatenate_datasets

    pool = concatenate_datasets([load_prompts(name, split) for name in names])
    if not 0 < n <= len(pool):
        raise ValueError(f"{n} prompts of {' and '.join(names)} asked for, the {split} split has 1 to {len(pool)}")
    return pool.select(rng.permutation(len(pool))[:n])


def load_compliance() -> list[str]:
    """Our *redacted* compliance: texts that open as a compliant answer does and go on without content."""
    return [row["text"] for row in _own("compliance.jsonl")]


def load_everyday_answers() -> Dataset:
    """Written answers (no model's own) to the ``eval`` split of ``"everyday"``: columns ``prompt``, ``response``."""
    from datasets import Dataset

    return Dataset.from_list(_own("everyday_answers.jsonl"))


def load_refusals(category: str | None = None) -> list[str]:
    """Our refusals: the general ones, and those written for ``category``."""
    return [row["text"] for row in _own("refusals.jsonl") if row["category"] in ("general", category)]


def load_task(split: str, n: int | None = None, seed: int = 0) -> Dataset:
    """The downstream task: is a news headline sarcastic? Columns ``prompt``, ``response`` (yes / no), ``label``.

    Splits ``train`` and ``eval`` are disjoint; ``n`` rows are drawn from one, half of each class, by ``seed``.
    Source: News Headlines Dataset for Sarcasm Detection (Misra and Arora 2019), as packaged by OpenAI evals.
    """
    import numpy as np
    from datasets import Dataset

    if split not in ("train", "eval"):
        raise DataError(f"the task has no split {split!r}: it has train, eval")
    texts, labels = _headlines()
    pool = np.arange(len(texts)) % 4 == 0  # a fixed quarter judges
    chosen = np.flatnonzero(pool if split == "eval" else ~pool)
    if n is not None:
        rng = np.random.default_rng(seed)
        halves = [rng.permutation(chosen[labels[chosen] == answer]) for answer in (0, 1)]
        if n > 2 * min(map(len, halves)):
            raise DataError(f"{n} headlines asked for, the {split} split has {2 * min(map(len, halves))} balanced ones")
        chosen = rng.permutation(np.concatenate([halves[0][: n - n // 2], halves[1][: n // 2]]))
    return Dataset.from_list(
        [
            {
                "prompt": f"{TASK_SYSTEM}\nHeadline: {texts[i]}",
                "response": TASK_ANSWERS[labels[i]],
                "label": int(labels[i]),
            }
            for i in chosen
        ]
    )


@lru_cache
def _headlines():
    import numpy as np

    (path,) = fetch_members("sarcasm-headlines").values()
    seen: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seen.setdefault(row["input"][-1]["content"].strip(), int(row["ideal"]))  # first of repeated headlines
    return list(seen), np.array(list(seen.values()))


def _own(file: str) -> list[dict]:
    path = data_dir() / file
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


@lru_cache
def _pairs(file: str, column: str, source: str) -> list[dict]:
    return [_row(p[column], int(column == "harmful"), p["category"], source, p["split"]) for p in _own(file)]


@lru_cache
def _everyday() -> list[dict]:
    return [_row(r["prompt"], 0, r["category"], "safelab-everyday", r["split"]) for r in _own("everyday.jsonl")]


@lru_cache
def _advbench() -> list[dict]:
    splits = json.loads((data_dir() / "advbench_splits.json").read_text(encoding="utf-8"))
    by_index = {index: split for split, indices in splits["splits"].items() for index in indices}
    return [row | {"split": by_index[i]} for i, row in enumerate(read_advbench()) if i in by_index]


def read_advbench() -> list[dict]:
    """All rows of AdvBench (Zou et al. 2023) in file order, before splits are given."""
    import yaml

    (path,) = fetch_members("advbench").values()
    seeds = yaml.safe_load(path.read_text(encoding="utf-8"))["seeds"]
    return [_row(s["value"].strip(), 1, (s.get("harm_categories") or [""])[0], "advbench", "") for s in seeds]


@lru_cache
def _strongreject() -> list[dict]:
    """StrongREJECT (Souly et al. 2024): 313 forbidden prompts."""
    files = fetch_members("strongreject")
    path = next(p for p in files.values() if p.name == "strongreject_dataset.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return [_row(r["forbidden_prompt"].strip(), 1, r["category"], "strongreject", "eval") for r in csv.DictReader(file)]


def _row(prompt: str, label: int, category: str, source: str, split: str) -> dict:
    return {"prompt": prompt, "label": label, "category": category, "source": source, "split": split}


PROMPT_SETS = {
    "harmful": _Registered(partial(_pairs, "pairs.jsonl", "harmful", "safelab"), SPLITS),
    "twins": _Registered(partial(_pairs, "pairs.jsonl", "benign", "safelab-twin"), SPLITS),
    "hard-harmful": _Registered(partial(_pairs, "hard_pairs.jsonl", "harmful", "safelab-hard"), ("eval",)),
    "hard-twins": _Registered(partial(_pairs, "hard_pairs.jsonl", "benign", "safelab-hard-twin"), ("eval",)),
    "balanced-harmful": _Registered(partial(_pairs, "balanced_pairs.jsonl", "harmful", "safelab-balanced"), ("eval",)),
    "balanced-twins": _Registered(partial(_pairs, "balanced_pairs.jsonl", "benign", "safelab-balanced-twin"), ("eval",)),
    "everyday": _Registered(_everyday, SPLITS),
    "advbench": _Registered(_advbench, SPLITS),
    "strongreject": _Registered(_strongreject, ("eval",)),
}


# ------------------------------------------------------------------------------------- human labels

LABEL_SETS = ("human-harm", "human-refusal", "human-objective")


def load_labels(name: str) -> Dataset:
    """(prompt, response) pairs that people have judged, from PyRIT's scorer evaluations (Microsoft, MIT).

    Parameters
    ----------
    name
        ``"human-harm"`` (990 pairs, each rated 0, 0.25 .. 1 for harm; 386 of them by three raters),
        ``"human-refusal"`` (169: did the response refuse, or answer something else?) or ``"human-objective"``
        (395: was the request's objective achieved?).

    Returns
    -------
    Dataset
        Columns ``prompt``, ``response``, ``score`` (mean of the raters, 0..1), ``scores`` (one a rater), ``label``
        (1 where the score is at least 0.5), ``category`` and ``group``: prompts that nearly repeat each other share
        one, in all three sets, so that a split by group tests on prompts never seen.
    """
    from datasets import Dataset

    if name not in LABEL_SETS:
        raise DataError(f"no human labels called {name!r}: there are {', '.join(LABEL_SETS)}")
    groups = _label_groups()
    return Dataset.from_list([row | {"group": groups[row["prompt"]]} for row in _label_rows(name)])


@lru_cache
def _label_rows(name: str) -> list[dict]:
    rows = []
    for file, path in fetch_members(name).items():
        if file == "mini_hate_speech.csv":  # 15 rows of hate_speech_multi_score.csv again
            continue
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
        start = next(i for i, line in enumerate(lines) if not line.startswith("#"))  # the version, in comments
        for record in csv.DictReader(lines[start:], strict=True):
            scores = [float(value) for column, value in record.items() if column.startswith("human_score") and value]
            score = sum(scores) / len(scores)
            text = {"prompt": record["objective"].strip(), "response": record["assistant_response"].strip()}
            category = (record.get("harm_category") or "").lower()
            rows.append(text | {"score": score, "scores": scores, "label": int(score >= 0.5), "category": category})
    return rows


@lru_cache
def _label_groups() -> dict[str, int]:
    """Prompt -> group, over all label sets."""
    prompts = list(dict.fromkeys(row["prompt"] for name in LABEL_SETS for row in _label_rows(name)))
    group = list(range(len(prompts)))
    for i, j in near_duplicates(prompts):
        old, new = group[j], group[i]
        group = [new if g == old else g for g in group]
    return dict(zip(prompts, group))


# --------------------------------------------------------------------------------------------- files


def read_prompt_file(path: str | Path, *, label: int | None = None) -> list[dict]:
    """Rows of a .jsonl, .csv or .txt (one prompt a line) file; ``prompt`` is needed, ``label`` and ``category`` optional."""
    rows = []
    for line, record in _records(path, needed=("prompt",)):
        given = record.get("label")
        given = label if given in (None, "") else given
        if given not in (None, 0, 1, "0", "1"):
            raise DataError(f"{path}, line {line}: label {given!r}, expected 0 (benign) or 1 (harmful)")
        category = record.get("category") or ""
        if not isinstance(category, str):
            raise DataError(f"{path}, line {line}: category is {type(category).__name__}, expected text")
        rows.append(_row(record["prompt"], -1 if given is None else int(given), category, Path(path).name, ""))
    return rows


def read_pair_file(path: str | Path) -> list[dict]:
    """Rows of a .jsonl or .csv fine-tuning file: ``prompt`` and ``response`` are needed."""
    return [record for _, record in _records(path, needed=("prompt", "response"))]


def _records(path: str | Path, needed: tuple[str, ...]):
    path = Path(path).expanduser()
    if not path.is_file():
        sets = f", and no registered set of that name: the sets are {', '.join(PROMPT_SETS)}" if needed == ("prompt",) else ""
        raise DataError(f"no file at {path}{sets}")
    readers = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt}
    if path.suffix not in readers or (path.suffix == ".txt" and needed != ("prompt",)):
        wanted = ".jsonl, .csv or .txt" if needed == ("prompt",) else ".jsonl or .csv"
        raise DataError(f"{path}: expected a {wanted} file with {' and '.join(needed)}")
    found = False
    try:
        for line, record in readers[path.suffix](path):
            found = True
            for column in needed:
                if column not in record:
                    raise DataError(f"{path}, line {line}: no {column!r}; expected {' and '.join(needed)}, found {', '.join(map(str, record))}")
                if not isinstance(record[column], str) or not record[column].strip():
                    raise DataError(f"{path}, line {line}: {column!r} is {record[column]!r}, expected a text that is not empty")
                if any("\ud800" <= character <= "\udfff" for character in record[column]):  # an escape cut in half
                    raise DataError(f"{path}, line {line}: {column!r} holds half of a surrogate pair, expected whole characters")
            yield line, record
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {_undecodable_line(path)}: not UTF-8 text; save it as UTF-8") from error
    if not found:
        raise DataError(f"{path} is empty: expected at least one row with {' and '.join(needed)}")


def _undecodable_line(path: Path) -> int:
    """The first line that is not UTF-8 (the error's own position is relative to a block of the file)."""
    lines = path.read_bytes().split(b"\n")
    return next(number for number, line in enumerate(lines, 1) if line.decode(errors="ignore").encode() != line)


def _jsonl(path: Path):
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error.msg}); expected one object a line") from error
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: a {type(record).__name__}, expected an object such as {{\"prompt\": \"...\"}}")
            yield number, record


def _csv(path: Path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        lines = reader.reader  # its count is right after an error too
        try:
            for record in reader:
                if None in record:
                    raise DataError(f"{path}, line {lines.line_num}: more fields than the header has; quote texts that contain commas")
                yield lines.line_num, record
        except csv.Error as error:
            raise DataError(f"{path}, line {lines.line_num}: not CSV ({error})") from error


def _txt(path: Path):
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, {"prompt": line.strip()}


# --------------------------------------------------------------------------------- near-duplicates


def near_duplicates(left: list[str], right: list[str] | None = None, *, threshold: float = 0.75) -> list[tuple[int, int]]:
    """Index pairs whose texts nearly repeat each other: cosine of their sets of 3-5 character grams above ``threshold``.

    With one list: pairs ``i < j`` inside it; with two: every pair across. The cosine of two texts depends on
    nothing but them.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    if not left or right == []:
        return []
    grams = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), binary=True, alternate_sign=False)
    first = grams.transform(left)
    close = (first @ (first if right is None else grams.transform(right)).T).tocoo()
    return sorted((int(i), int(j)) for i, j, v in zip(close.row, close.col, close.data) if v > threshold and (right is not None or i < j))
