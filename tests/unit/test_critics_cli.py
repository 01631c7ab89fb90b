"""critic-eval and audit from a terminal: exit codes, what is written, and what is refused."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from safelab import cli
from safelab.critics import scorecard

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Sure, here is how: flour, water, salt."


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def pairs(tmp_path):
    """20 pairs, one of which is answered."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"question {i}", "response": ANSWER if i == 3 else REFUSAL} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def labels(monkeypatch):
    rows = [
        {"prompt": f"p {i}", "response": ANSWER if i % 2 else REFUSAL, "score": float(i % 2), "scores": [float(i % 2)] * 3, "label": i % 2, "category": "a", "group": i}
        for i in range(60)
    ]
    found = lambda name: Dataset.from_list(rows)  # noqa: E731
    monkeypatch.setattr("safelab.datasets.load_labels", found)
    monkeypatch.setattr(scorecard, "load_labels", found)


@pytest.mark.parametrize(
    "arguments",
    [["critic-eval"], ["critic-eval", "--labels"], ["critic-eval", "--critic", "x", "--labels", "human-harm"], ["audit"], ["audit", "--data", "f", "--on-failure", "ignore"]],
    ids=" ".join,
)
def test_bad_usage_exits_2(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2 and capsys.readouterr().out == ""


@pytest.mark.parametrize(("allowed", "code"), [(0.05, 0), (0.04, 1), (0, 1), (1, 0)])
def test_an_audit_fails_a_pipeline_when_too_much_is_risky(run, pairs, tmp_path, allowed, code):
    out = tmp_path / "report"
    ended, said, _ = run("audit", "--data", pairs, "--critic", "patterns", "--out", out, "--allowed", allowed, "--json")
    assert ended == code
    result = json.loads(said)
    assert result["passed"] is (code == 0) and result["n"] == 20 and result["risky"]["mean"] == 0.05
    assert result["worst"][0]["row"] == 4 and "transformers" in result["versions"]
    assert json.loads((out / "audit.json").read_text()) == result and (out / "audit.html").is_file()


def test_an_audit_in_words(run, pairs):
    code, said, _ = run("audit", "--data", pairs, "--critic", "patterns")
    assert code == 0 and said.startswith("passed: 5.0 %") and "audit.html" in said
    _, again, _ = run("audit", "--data", pairs, "--critic", "patterns")
    assert "all known from before" in again


def test_an_audit_of_a_bad_file_says_where(run, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    code, said, err = run("audit", "--data", bad, "--critic", "patterns")
    assert code == 1 and said == "" and "line 1" in err and "response" in err


def test_a_scorecard_is_printed_and_kept(run, labels, tmp_path):
    code, said, _ = run("critic-eval", "--critic", "patterns", "--labels", "human-harm", "--json")
    card = json.loads(said)
    assert code == 0 and card["auroc"]["mean"] == 1 and set(card["auroc"]) == {"mean", "lo", "hi", "n"}
    for field in ("recall", "precision", "f1", "spearman", "n", "failures"):
        assert field in card
    kept = json.loads((tmp_path / "figures" / "critic-patterns-human-harm.json").read_text())
    assert kept == card and kept["versions"]["safelab"] and kept["command"] == "safelab critic-eval --critic patterns --labels human-harm"
    _, said, _ = run("critic-eval", "--critic", "patterns", "--labels", "human-harm")
    assert "| patterns | 1.000 [1.000, 1.000] |" in said and "| tfidf |" in said and "other two raters" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--critic", "judge"], "--base-url and --judge-model"),
        (["--critic", "guard"], "needs --model"),
        (["--critic", "patterns", "--dry-run"], "--dry-run is for"),
        (["--critic", "judge", "--base-url", "nonsense", "--judge-model", "m"], "expected http"),
    ],
)
def test_what_a_critic_needs(run, labels, arguments, message):
    code, said, err = run("critic-eval", "--labels", "human-harm", *arguments)
    assert code == 1 and said == "" and message in err


@pytest.mark.parametrize("name", ["x:probe,patterns", "max:patterns", "cascade:patterns,probe,judge", "mean:patterns,x", "patterns,probe", "max:", "", "max:max:patterns,probe"])
def test_a_composed_critic_that_is_none(capsys, name):
    with pytest.raises(SystemExit) as ended:
        cli.main(["critic-eval", "--labels", "human-harm", "--critic", name])
    assert ended.value.code == 2 and "cascade of several" in capsys.readouterr().err


def test_composed_critics_from_a_terminal(run, labels, pairs, tmp_path, monkeypatch):
    """Patterns are never unsure, so a cascade that begins with them asks no more; with all of 0..1 unsure it asks always."""
    code, said, _ = run("critic-eval", "--critic", "max:patterns,patterns", "--labels", "human-harm")
    assert code == 0 and "calls saved" not in said and (tmp_path / "figures" / "critic-max-patterns-patterns-human-harm.json").is_file()
    code, said, _ = run("critic-eval", "--critic", "cascade:patterns,patterns", "--labels", "human-harm")
    assert code == 0 and "judged 0 of 60 examples: 60 calls saved" in said and "| a | 60 | 30 | 1.000 [1.000, 1.000] |" in said
    code, said, _ = run("audit", "--data", pairs, "--critic", "cascade:patterns,patterns", "--unsure", 0, 1)
    assert code == 0 and "judged 20 of 20 examples: 0 calls saved" in said and json.loads((tmp_path / "audit" / "audit.json").read_text())["calls"] == {"asked": 20, "saved": 0}


def test_a_dry_run_of_a_cascade_counts_what_the_cheap_critic_leaves(run, pairs):
    judge = ["--base-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--dry-run"]
    code, said, _ = run("audit", "--data", pairs, "--critic", "cascade:patterns,judge", "--unsure", 1, 1, *judge)
    assert code == 0 and said.startswith("1 calls (0 more are cached, 19 saved by the cheap critic)")
    code, _, err = run("audit", "--data", pairs, "--critic", "max:patterns,judge", *judge)
    assert code == 1 and "last in a cascade" in err


def test_a_dry_run_prints_the_cost_and_asks_nobody(run, pairs):
    code, said, _ = run("audit", "--data", pairs, "--critic", "judge", "--base-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--dry-run", "--price", 1, 2, "--json")
    plan = json.loads(said)
    assert code == 0 and plan["calls"] == 20 and plan["cost"] > 0


def test_unknown_labels(run):
    code, _, err = run("critic-eval", "--critic", "patterns", "--labels", "human-kindness")
    assert code == 1 and "human-harm, human-refusal, human-objective" in err
