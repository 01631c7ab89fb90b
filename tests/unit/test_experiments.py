"""Rows, their cache, and what is said about time."""

import json
import mmap

import numpy as np
import pytest
import torch
from datasets import Dataset

from safelab import experiments
from safelab.critics import PatternCritic, ProbeCritic
from safelab.datasets import load_task
from safelab.defenses import SFT, AdaptiveJudge, AdaptiveProbe, ConstantKL
from safelab.experiments import Budget, Suite, _weights_hash, fingerprint, peak_memory, pooled, run_cell, summarise, with_time_left
from safelab.models import SAFE
from safelab.probes import HarmProbe

DATA = Dataset.from_dict({"prompt": ["a", "b"], "response": ["c", "d"], "harmful": [0, 1]})


@pytest.fixture
def no_model(monkeypatch, tmp_path):
    """run_cell with everything that computes replaced; counts what would have been run."""
    runs = []
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path))
    monkeypatch.setattr("safelab.models.load_model", lambda name: (type("M", (), {"device": type("D", (), {"type": "cpu"})})(), None))
    monkeypatch.setattr(experiments, "fine_tune", lambda model, *a, **k: (runs.append(a), (model, {"step_seconds": 1.0, "history": []}))[1])
    monkeypatch.setattr(Suite, "measure", lambda self, *a: {"asr": [0, 1], "utility": [1, 1]})
    monkeypatch.setattr(experiments, "_weights_hash", lambda model: "w")
    return runs


def test_the_safe_start_at_another_strength_is_another_model(monkeypatch, tmp_path):
    """Its strength is in the adapter's configuration, not in its weights."""
    folder = tmp_path / "safe-adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(experiments, "data_dir", lambda: tmp_path)
    found = set()
    for strength in (16, 16.8, 16):
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": strength}))
        found.add(_weights_hash(SAFE))
    assert len(found) == 2


def cell(defense=None, seed=0, data=DATA, **kwargs):
    return run_cell("attack", data, defense, seed, model="m", budget=Budget(), suite=Suite(), **kwargs)


def test_a_finished_row_is_read_not_run(no_model):
    first = cell(SFT())
    again = cell(SFT())
    assert len(no_model) == 1 and again.pop("cached") and again == first


def test_a_leaning_to_one_answer_is_taken_out(monkeypatch):
    """A model that ranks every headline rightly and says "sarcastic" to nearly all of them."""
    labels = np.array(load_task("eval", 40)["label"])
    preference = torch.tensor(np.where(labels, 9.0, np.arange(40) / 20))
    monkeypatch.setattr("safelab.evaluation.answer_scores", lambda *a, **k: torch.stack([torch.zeros(40), preference - 0.1], -1))
    monkeypatch.setattr("safelab.evaluation.generate", lambda model, tokenizer, prompts, **k: ["No."] * len(prompts))
    flags = Suite(harmful=2, strongreject=2, benign=2, task=40).measure(None, None)
    assert 0.5 <= np.mean(flags["utility"]) < 0.6
    assert flags["utility_balanced"] == [1] * 40


def test_rows_from_before_a_measure_are_pooled_without_it(no_model):
    old, new = cell(SFT()), cell(SFT(), seed=1)
    new["flags"] = new["flags"] | {"utility_balanced": [1, 0]}
    assert summarise("sft", [new])["utility_balanced"]["mean"] == 0.5
    for rows in ([old, new], [new, old]):
        assert "utility_balanced" not in summarise("sft", rows) and summarise("sft", rows)["utility"]["mean"] == 1


@pytest.mark.parametrize("change", [{"seed": 1}, {"defense": ConstantKL(0.5)}, {"data": DATA.select([0])}, {"force": True}])
def test_whatever_changes_the_result_runs_again(no_model, change):
    cell(SFT())
    cell(**{"defense": SFT(), **change})
    assert len(no_model) == 2


def test_another_probe_or_version_of_a_given_critic_makes_another_row(no_model):
    def probe(seed, layers):
        rng = np.random.default_rng(seed)
        fitted = HarmProbe().fit(rng.normal(size=(40, 3)), np.arange(40) % 2)
        return ProbeCritic(fitted, None, None, layers)

    critics = [probe(0, [1]), probe(0, [1]), probe(1, [1]), probe(0, [2]), PatternCritic(), PatternCritic()]
    critics[-1].version = 2
    counts = []
    for critic in critics:
        cell(AdaptiveProbe(critic=critic))
        counts.append(len(no_model))
    assert counts == [1, 1, 2, 3, 4, 5]


def test_a_run_that_fails_leaves_no_row(no_model, monkeypatch, tmp_path):
    def stop(self, *a):
        raise KeyboardInterrupt

    monkeypatch.setattr(Suite, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        cell(SFT())
    assert not list((tmp_path / "runs").glob("*.json"))


def test_row_says_what_made_it(no_model):
    row = cell(ConstantKL(0.3), seed=2)
    assert (row["defense"], row["seed"], row["settings"]) == ("constant-kl", 2, {"beta_min": 0.3, "beta_max": 0.3})
    assert row["versions"]["torch"] and row["data"] == fingerprint(DATA)
    json.dumps(row)


def test_a_row_says_which_critic_trained_and_which_measures(no_model, caplog):
    """Kept rows too, and whatever they were kept with; the refusal patterns that measure are a critic themselves."""
    for _ in range(2):
        assert cell(AdaptiveJudge())["critics"] == {"trained_with": "classifier", "evaluated_with": "patterns", "same_critic": False}
    assert cell(SFT())["critics"]["trained_with"] is None and not caplog.text
    for _ in range(2):
        caplog.clear()
        assert cell(AdaptiveJudge(critic=PatternCritic()))["critics"]["same_critic"] and "use another to measure" in caplog.text
    assert summarise("adaptive-judge", [cell(AdaptiveJudge())])["critics"]["trained_with"] == "classifier"


def test_seeds_add_no_cases():
    """Two seeds on the same two cases: the mean of both, the interval of two cases."""
    r = pooled([{"mean": 0.5, "n": 2}, {"mean": 1.0, "n": 2}])
    assert (r.mean, r.n) == (0.75, 2)
    assert r.hi - r.lo > 0.4


def test_summary_keeps_each_seed(no_model):
    rows = [cell(SFT()), cell(SFT(), seed=1)]
    arm = summarise("sft", [row | {"peak_memory_mb": mb, "step_seconds": s} for row, mb, s in zip(rows, (900, 400), (1.0, 2.0))])
    assert (arm["peak_memory_mb"], arm["step_seconds"]) == (400, 1.0)  # what else the process and the machine did only adds
    assert arm["asr"]["mean"] == 0.5 and [s["seed"] for s in arm["by_seed"]] == [0, 1]


def test_fingerprint_sees_content_only():
    assert fingerprint(DATA) == fingerprint(Dataset.from_list(list(DATA)))
    assert fingerprint(DATA) != fingerprint(DATA.select([1, 0]))


def test_time_left_counts_down(monkeypatch):
    clock = iter([0.0, 100.0, 200.0])
    monkeypatch.setattr(experiments.time, "monotonic", lambda: next(clock))
    said = [text for _, text in with_time_left(["a", "b", "c"])]
    assert said[0] == " (1 of 3)" and "about 3 min left" in said[1] and "about 2 min left" in said[2]


def test_peak_memory_sees_what_was_freed():
    with peak_memory() as small:
        pass
    with peak_memory() as large:
        with mmap.mmap(-1, 300_000_000) as block:  # not from the heap, where there may be as much to use again
            block[::4096] = b"x" * len(range(0, len(block), 4096))
    assert large[0] > small[0] + 200


@pytest.mark.parametrize("field", ["learning_rate", "epochs", "batch_size", "rank"])
def test_budget_must_be_positive(field):
    with pytest.raises(ValueError, match="positive"):
        Budget(**{field: 0})
