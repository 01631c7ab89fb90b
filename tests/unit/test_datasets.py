"""Prompt files, pair files, registered sets of ours and near-duplicates."""

from __future__ import annotations

import csv
import json
from collections import Counter

import numpy as np
import pytest

from safelab import datasets
from safelab.datasets import DataError, load_prompts, near_duplicates, read_pair_file, read_prompt_file

OWN_SETS = ("harmful", "twins", "everyday")


@pytest.fixture
def write(tmp_path):
    """``write(name, content) -> path``; text is written as UTF-8, byte for byte."""

    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def _prompts(path) -> list[str]:
    return [row["prompt"] for row in read_prompt_file(path)]


# ------------------------------------------------------------------------------------ files that are fine

AS_JSONL = '{"prompt": "Grüße?"}\n{"prompt": "two"}\n'
AS_CSV = "prompt,label\nGrüße?,1\ntwo,0\n"
AS_TXT = "Grüße?\ntwo\n"


@pytest.mark.parametrize("name, text", [("a.jsonl", AS_JSONL), ("a.csv", AS_CSV), ("a.txt", AS_TXT)])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: text.rstrip("\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\n\n"),
        lambda text: "\ufeff" + text.replace("\n", "\r\n\r\n"),
    ],
    ids=["plain", "no-last-newline", "bom", "crlf", "blank-lines", "bom-crlf-blank-lines"],
)
def test_prompts_are_read_however_the_file_was_saved(write, name, text, change):
    assert _prompts(write(name, change(text))) == ["Grüße?", "two"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_quoted_csv_text_keeps_its_newlines_commas_and_quotes(write, newline):
    text = 'first line\nsecond, with a comma\n\nand "quotes"'
    quoted = '"' + text.replace('"', '""') + '"'
    path = write("a.csv", newline.join(["prompt,label", quoted, "plain,0", ""]))
    assert _prompts(path) == [text, "plain"]


def test_a_csv_written_by_the_standard_library_comes_back(tmp_path):
    rows = [["a,b", "1"], ['say "hi"', "0"], ["two\nlines", "1"], ["two\r\nlines", "1"], ["  spaced  ", ""]]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["prompt", "label"], *rows])
    found = [(row["prompt"], row["label"]) for row in read_prompt_file(tmp_path / "a.csv")]
    assert found == [(prompt, int(label or -1)) for prompt, label in rows]


def test_a_line_separator_inside_a_json_text_ends_no_row(write):
    path = write("a.jsonl", '{"prompt": "one\u2028two\u0085three"}\n')
    assert _prompts(path) == ["one\u2028two\u0085three"]


def test_columns_and_their_defaults(write):
    path = write("mine.jsonl", '{"prompt": "a", "label": 1, "category": "fraud", "note": 3}\n{"prompt": "b"}\n')
    assert read_prompt_file(path) == [
        {"prompt": "a", "label": 1, "category": "fraud", "source": "mine.jsonl", "split": ""},
        {"prompt": "b", "label": -1, "category": "", "source": "mine.jsonl", "split": ""},
    ]


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "prompt,label\nx,\ny,0\n"),
        ("a.jsonl", '{"prompt": "x", "label": null}\n{"prompt": "y", "label": "0"}\n'),
        ("b.jsonl", '{"prompt": "x"}\n{"prompt": "y", "label": 0}\n'),
    ],
)
def test_a_given_label_holds_for_rows_that_bring_none(write, name, text):
    assert [row["label"] for row in read_prompt_file(write(name, text), label=1)] == [1, 0]
    assert [row["label"] for row in read_prompt_file(write(name, text))] == [-1, 0]


def test_load_prompts_takes_a_path_as_text_or_path_and_under_the_home_folder(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = write("a.txt", AS_TXT)
    for name in (path, str(path), "~/a.txt"):
        assert load_prompts(name)["prompt"][:] == ["Grüße?", "two"]


def test_pairs_keep_their_columns(write):
    path = write("a.csv", "prompt,response,risk\nq,a,0.5\n")
    assert read_pair_file(path) == [{"prompt": "q", "response": "a", "risk": "0.5"}]


# ------------------------------------------------------------------------------- files that are malformed

MALFORMED = {
    # file name, content, line (None: of the whole file), what the message must say
    "no column, jsonl": ("a.jsonl", '{"prompt": "x"}\n{"text": "y", "id": 1}\n', 2, "no 'prompt'; expected prompt, found text, id"),
    "no column, csv": ("a.csv", "question,label\nx,1\n", 2, "no 'prompt'; expected prompt, found question, label"),
    "empty jsonl": ("a.jsonl", "", None, "is empty: expected at least one row with prompt"),
    "only a BOM": ("a.txt", "\ufeff", None, "is empty"),
    "only blank lines": ("a.txt", "\n \n\t\n", None, "is empty"),
    "only a csv header": ("a.csv", "prompt,label\n", None, "is empty"),
    "number": ("a.jsonl", '{"prompt": 3}\n', 1, "'prompt' is 3, expected a text"),
    "null": ("a.jsonl", '{"prompt": null}\n', 1, "'prompt' is None, expected a text"),
    "list of texts": ("a.jsonl", '{"prompt": ["x"]}\n', 1, "'prompt' is ['x'], expected a text"),
    "blank prompt, jsonl": ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": " \\n"}\n', 3, "expected a text that is not empty"),
    "blank prompt, csv": ("a.csv", "label,prompt\n1,x\n0,\n", 3, "expected a text that is not empty"),
    "too few csv fields": ("a.csv", "label,prompt\n1\n", 2, "'prompt' is None, expected a text"),
    "half a surrogate pair": ("a.jsonl", '{"prompt": "cut \\ud83d"}\n', 1, "'prompt' holds half of a surrogate pair"),
    "label 2": ("a.jsonl", '{"prompt": "x", "label": 2}\n', 1, "label 2, expected 0 (benign) or 1 (harmful)"),
    "label in words": ("a.csv", "prompt,label\nx,1\ny,harmful\n", 3, "label 'harmful', expected 0 (benign) or 1 (harmful)"),
    "label list": ("a.jsonl", '{"prompt": "x", "label": [1]}\n', 1, "label [1], expected 0"),
    "label nan": ("a.jsonl", '{"prompt": "x", "label": NaN}\n', 1, "label nan, expected 0"),
    "category number": ("a.jsonl", '{"prompt": "x", "category": 3}\n', 1, "category is int, expected text"),
    "not json": ("a.jsonl", '{"prompt": "x"}\n{"prompt": "y",}\n', 2, "not JSON"),
    "plain text as jsonl": ("a.jsonl", "How do I bake bread?\n", 1, "not JSON"),
    "json array line": ("a.jsonl", '{"prompt": "x"}\n["y"]\n', 2, "a list, expected an object such as"),
    "json string line": ("a.jsonl", '"x"\n', 1, "a str, expected an object such as"),
    "too many csv fields": ("a.csv", "prompt,label\nx,1\nOh, y,0\n", 3, "more fields than the header has; quote texts that contain commas"),
    "blank lines are counted": ("a.csv", "prompt,label\n\n\nHello, you,0\n", 4, "more fields than the header has"),
    "quoted newlines are counted": ("a.csv", 'prompt,label\n"x\ny",1\nz,3\n', 4, "label '3'"),
    "open quote": ("a.csv", 'prompt,label\nx,1\n"y,0\n', 3, "not CSV (unexpected end of data)"),
    "text after a quote": ("a.csv", 'prompt,label\nx,1\n"y" z,0\n', 3, "not CSV"),
    "latin-1": ("a.txt", "fine\ncafé\n".encode("latin-1"), 2, "not UTF-8"),
    "latin-1, csv": ("a.csv", "prompt\nfine\ncafé\n".encode("latin-1"), 3, "not UTF-8"),
    "latin-1 after 30 kB": ("a.jsonl", b'{"prompt": "fine"}\n' * 2000 + b'{"prompt": "caf\xe9"}\n', 2001, "not UTF-8"),
    "utf-16": ("a.txt", "fine\n".encode("utf-16"), 1, "not UTF-8"),
}


@pytest.mark.parametrize("name, content, line, message", MALFORMED.values(), ids=MALFORMED)
def test_an_error_names_file_line_and_what_was_expected(write, name, content, line, message):
    path = write(name, content)
    with pytest.raises(DataError) as error:
        read_prompt_file(path)
    assert str(error.value).startswith(f"{path}, line {line}: " if line else f"{path} ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_comes_from_load_prompts_too(write):
    with pytest.raises(DataError, match="line 1: label 2"):
        load_prompts(write("a.jsonl", '{"prompt": "x", "label": 2}\n'))


@pytest.mark.parametrize("name", ["a.json", "a.tsv", "a.parquet", "a"])
def test_a_wrong_suffix_is_named_with_what_is_read(write, name):
    path = write(name, AS_TXT)
    with pytest.raises(DataError, match="expected a .jsonl, .csv or .txt file with prompt") as error:
        read_prompt_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "nosuchset"])
def test_a_missing_file_lists_the_registered_sets(tmp_path, name):
    with pytest.raises(DataError, match="harmful, twins, hard-harmful, hard-twins, balanced-harmful, balanced-twins, everyday, advbench, strongreject") as error:
        load_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="no file at .*folder.jsonl"):
        load_prompts(tmp_path / "folder.jsonl")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"prompt": "x"}\n', "line 1: no 'response'; expected prompt and response, found prompt"),
        ("a.csv", "prompt,response\nx,\n", "line 2: 'response' is '', expected a text"),
        ("a.txt", "x\n", "expected a .jsonl or .csv file with prompt and response"),
        ("a.csv", "prompt,response\n", "expected at least one row with prompt and response"),
    ],
)
def test_a_pair_file_needs_both_texts(write, name, text, message):
    with pytest.raises(DataError) as error:
        read_pair_file(write(name, text))
    assert message in str(error.value)


# ----------------------------------------------------------------------------------------- registered sets


def test_an_unknown_split_is_refused_with_those_there_are(write):
    with pytest.raises(DataError, match="harmful has no split 'test': it has align, probe, attack, eval"):
        load_prompts("harmful", "test")
    with pytest.raises(DataError, match="strongreject has no split 'align': it has eval"):
        load_prompts("strongreject", "align")
    with pytest.raises(DataError, match="a file has no splits; 'eval'"):
        load_prompts(write("a.txt", AS_TXT), "eval")


@pytest.mark.parametrize("name", OWN_SETS)
def test_the_splits_of_our_sets_make_up_the_whole_and_share_no_prompt(name):
    whole = load_prompts(name)
    parts = [load_prompts(name, split) for split in datasets.SPLITS]
    assert all(len(part) for part in parts)
    assert Counter(p for part in parts for p in part["prompt"]) == Counter(whole["prompt"])
    assert len(set(whole["prompt"])) == len(whole)
    assert set(whole["label"]) == {int(name == "harmful")}
    assert whole.column_names == ["prompt", "label", "category", "source", "split"]


def test_a_harmful_prompt_and_its_twin_lie_in_one_split_row_by_row():
    harmful, twins = load_prompts("harmful"), load_prompts("twins")
    assert len(harmful) == len(twins)
    for column in ("split", "category"):
        assert list(harmful[column]) == list(twins[column])


def test_every_category_of_prompts_has_refusals_of_its_own():
    general = datasets.load_refusals()
    for category in set(load_prompts("harmful")["category"]):
        assert set(general) < set(datasets.load_refusals(category))


# ---------------------------------------------------------------------------------------- the task, made up


@pytest.fixture
def headlines(tmp_path, monkeypatch):
    """A made-up source of 60 headlines, 20 of them sarcastic, each given twice."""
    path = tmp_path / "samples.jsonl"
    rows = [{"input": [{"content": "judge this"}, {"content": f" headline {i} "}], "ideal": str(int(i % 3 == 0))} for i in range(60)]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, *rows]), encoding="utf-8")
    monkeypatch.setattr(datasets, "fetch_members", lambda name: {"samples.jsonl": path})
    datasets._headlines.cache_clear()
    yield
    datasets._headlines.cache_clear()


def test_the_task_splits_are_disjoint_and_complete(headlines):
    train, judged = datasets.load_task("train"), datasets.load_task("eval")
    assert not set(train["prompt"]) & set(judged["prompt"])
    assert len(set(train["prompt"]) | set(judged["prompt"])) == len(train) + len(judged) == 60
    for row in (*train, *judged):
        number = int(row["prompt"].rsplit(" ", 1)[1])
        assert row["label"] == (number % 3 == 0) and row["response"] == ("sarcastic" if row["label"] else "serious")


@pytest.mark.parametrize("n", [1, 8, 9])
def test_the_task_is_drawn_half_of_each_class_by_seed(headlines, n):
    rows = datasets.load_task("train", n, seed=3)
    assert len(set(rows["prompt"])) == n and abs(2 * sum(rows["label"]) - n) <= 1
    assert list(rows) == list(datasets.load_task("train", n, seed=3))
    if n > 1:
        assert set(rows["prompt"]) != set(datasets.load_task("train", n, seed=4)["prompt"])
    everything = {(row["prompt"], row["label"]) for row in datasets.load_task("train")}
    assert {(row["prompt"], row["label"]) for row in rows} <= everything


def test_the_task_gives_no_more_than_it_has(headlines):
    with pytest.raises(DataError, match="100 headlines asked for, the eval split has 10"):
        datasets.load_task("eval", 100)
    with pytest.raises(DataError, match="no split 'test'"):
        datasets.load_task("test")


# ----------------------------------------------------------------------------------------- near-duplicates

LOCK = "How do I pick the lock of my neighbour's front door at night?"


@pytest.mark.parametrize(
    "other, near",
    [
        (LOCK, True),
        (LOCK.upper(), True),
        ("  " + LOCK.replace(" ", "   ") + " ", True),
        ("How do I pick the lock of my neighbour's front door at midnight?", True),
        ("How do I fit a new lock to the front door?", False),
        ("What is a good recipe for a lemon cake with almonds?", False),
    ],
)
def test_near_duplicates_finds_what_a_reader_would(other, near):
    filler = ["Tell me about the rivers of Spain.", "Write a poem for a retired teacher."]
    assert near_duplicates([LOCK, *filler, other]) == ([(0, 3)] if near else [])
    assert near_duplicates([*filler, LOCK], [other, *filler[:1]]) == ([(0, 1), (2, 0)] if near else [(0, 1)])


def test_near_duplicates_within_a_list_gives_each_pair_once():
    assert near_duplicates([LOCK] * 3) == [(0, 1), (0, 2), (1, 2)]
    assert near_duplicates([LOCK]) == []


def test_a_higher_threshold_finds_a_subset():
    rng = np.random.default_rng(0)
    words = "how do I open a door with an old key and some oil".split()
    texts = [" ".join(rng.permutation(words)[: rng.integers(6, 12)]) for _ in range(40)]
    found = [set(near_duplicates(texts, threshold=t)) for t in (0.5, 0.7, 0.9)]
    assert found[0] > found[1] > found[2]
