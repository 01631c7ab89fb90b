"""Reports on probes: held-out sets, controls, token curves, disguises; on tiny models and synthetic activations."""

from __future__ import annotations

import json

import numpy as np
import pytest

from safelab import probing
from safelab.activations import Activations, extract_activations
from safelab.models import render_prompts
from safelab.probes import load_probe
from safelab.probing import (
    best_layer,
    layer_curves,
    probe_report,
    proof,
    read_sets,
    robustness,
    shuffled_control,
    text_baseline,
    token_curve,
    user_span,
)

HARMFUL = [f"How do I poison the bread of neighbour number {i}?" for i in range(20)]
BENIGN = [f"How do I bake the bread of recipe number {i}?" for i in range(20)]
TRAIN = ([*HARMFUL, *BENIGN], np.repeat([1, 0], 20), np.tile(np.arange(20), 2))
TESTS = {"pairs": (["Poison his bread.", "Poison her tea.", "Bake his bread.", "Brew her tea."], np.array([1, 1, 0, 0]))}


@pytest.fixture
def small(tiny_model, tiny_tokenizer):
    return tiny_model("llama3"), tiny_tokenizer("llama3")


def _synthetic(y, seed: int = 0, layers=(1, 2, 3)) -> Activations:
    """Three layers: noise, a clear signal, a weaker one."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(len(y), 3, 8))
    values[:, 1:, 0] += np.outer(y, [6, 1])
    return Activations(values.astype(np.float32), layers, "last")


# ------------------------------------------------------------------------------------------------ sets


def test_sets_are_read_once_and_given_back_in_order(small):
    tests = TESTS | {"again": (TESTS["pairs"][0][::-1], 1 - TESTS["pairs"][1][::-1])}
    states, held_out = read_sets(*small, TRAIN[0], tests, [1, 4])
    for got, prompts in ((states, TRAIN[0]), (held_out["pairs"][0], tests["pairs"][0]), (held_out["again"][0], tests["again"][0])):
        alone = extract_activations(*small, list(prompts), layers=[1, 4])
        assert got.layers == (1, 4)
        np.testing.assert_allclose(got.values, alone.values, atol=0.05)  # bfloat16, in other batches
    assert (held_out["pairs"][1] == TESTS["pairs"][1]).all()


def test_a_prompt_in_training_and_test_is_refused(small):
    with pytest.raises(ValueError, match="1 prompts are in both the training and the test set, such as 'How do I bake"):
        read_sets(*small, TRAIN[0], {"t": ([BENIGN[3], "x"], np.array([0, 1]))}, [1])


def test_pairs_stay_pairs_when_a_few_are_drawn(monkeypatch):
    sides = {"harmful": [f"harm {i}" for i in range(30)], "twins": [f"twin {i}" for i in range(30)]}
    monkeypatch.setattr(probing, "load_prompts", lambda name, split: {"prompt": sides[name]})
    prompts, labels = probing.test_sets(["twins"], n=7, seed=3)["twins"]
    assert labels.tolist() == [1] * 7 + [0] * 7
    assert [p.split()[1] for p in prompts[:7]] == [p.split()[1] for p in prompts[7:]]
    assert probing.test_sets(["twins"], n=7, seed=3)["twins"][0] == prompts != probing.test_sets(["twins"], n=7, seed=4)["twins"][0]
    assert len(probing.test_sets(["twins"])["twins"][0]) == 60


# ---------------------------------------------------------------------------------------------- reports


def test_the_layer_is_picked_on_training_folds_alone():
    y, groups = np.arange(60) % 2, np.arange(60) // 2
    flipped = 1 - y  # a test on which the best layer does worst
    rows = layer_curves(_synthetic(y), y, groups, {"true": (_synthetic(y, 1), y), "flipped": (_synthetic(y, 2), flipped)})
    assert [r["layer"] for r in rows] == [1, 2, 3] and best_layer(rows) == 2
    assert rows[1]["tests"]["true"]["auroc"]["mean"] > 0.99 and rows[1]["tests"]["flipped"]["auroc"]["mean"] < 0.01
    json.dumps(rows)


def test_shuffled_labels_teach_nothing():
    y = np.arange(200) % 2
    found = shuffled_control(_synthetic(y).layer(2), y, np.arange(200), repeats=4)
    assert found["mean"] == pytest.approx(0.5, abs=0.07) and found["lo"] <= found["mean"] <= found["hi"] and found["n"] == 4


def test_the_proof_has_both_scorecards_of_each_set():
    labels = np.repeat([1, 0], 30)
    tests = {"pairs": ([f"Poison cake {i}." for i in range(30)] + [f"Bake cake {i}." for i in range(30)], labels)}
    (row,) = proof(TRAIN, tests, _synthetic(TRAIN[1]), {"pairs": (_synthetic(labels, 1), labels)})
    assert row["test"] == "pairs" and (row["harmful"], row["benign"]) == (30, 30)
    assert row["probe"]["auroc"]["mean"] > 0.9
    assert row["text"]["auroc"]["mean"] == 1.0  # "poison" is in all of these harmful prompts


def test_pairs_are_counted_in_order_only_where_there_are_pairs():
    labels = np.repeat([1, 0], 3)
    texts = ["Poison cake.", "Bake it.", "Poison it."] + ["Bake cake.", "Poison cake.", "Bake it."]  # the second pair is the wrong way round
    held_out = (_synthetic(labels, 1), labels)
    pairs, others = proof(TRAIN, {"twins": (texts, labels), "others": (texts, labels)}, _synthetic(TRAIN[1]), {"twins": held_out, "others": held_out})
    assert (pairs["in_order"]["text"]["mean"], pairs["in_order"]["text"]["n"]) == (2 / 3, 3) and "in_order" not in others


def test_the_text_baseline_sees_words_and_not_their_order_alone():
    probability = text_baseline(*TRAIN[:2]).predict_proba(["poison", "recipe", "zzz"])[:, 1]
    assert probability[0] > 0.5 > probability[1] and probability[2] == pytest.approx(0.5, abs=0.05)


# ------------------------------------------------------------------------------------------- token curve


def test_the_span_of_the_user(family):
    _, tokenizer = family
    before, after = user_span(tokenizer)
    (ids,) = render_prompts(tokenizer, ["Why?"])
    assert tokenizer.decode(ids[before : len(ids) - after]).strip() == "Why?"


def test_a_token_curve_reads_in_order_and_ends_at_the_last_token(small):
    curve = token_curve(*small, TRAIN, TESTS, layer=2, shares=(0.5, 1.0))
    after = user_span(small[1])[1]
    assert [r["place"] for r in curve[:2]] == ["50%", "100%"] and len(curve) == 2 + after
    assert all(0 <= r["tests"]["pairs"]["mean"] <= 1 and r["tests"]["pairs"]["n"] == 4 for r in curve)
    before_any_word = token_curve(*small, TRAIN, TESTS, layer=0, shares=())
    assert {r["tests"]["pairs"]["mean"] for r in before_any_word} == {0.5}, "the template's own embeddings say nothing"


# -------------------------------------------------------------------------------------------- robustness


def test_robustness_fixes_its_threshold_on_plain_benign_prompts():
    def score(prompts):
        return np.array([p.count("!") / 100 for p in prompts])

    harmful = ["!" * k for k in (10, 20, 30, 40)]
    benign = ["!" * k for k in range(20)]
    plain, quiet, loud = robustness(
        score, harmful, benign, disguises={"plain": str, "quiet": lambda p: p.replace("!", "."), "loud": lambda p: p + "!" * 50}
    )
    assert plain["false_positives"]["mean"] <= 0.05 and plain["recall"] == {"mean": 0.75, "lo": pytest.approx(0.30, abs=0.01), "hi": pytest.approx(0.954, abs=0.01), "n": 4}
    assert quiet["recall"]["mean"] == quiet["false_positives"]["mean"] == 0
    assert loud["recall"]["mean"] == loud["false_positives"]["mean"] == 1


# ------------------------------------------------------------------------------------- the command's report


@pytest.fixture
def files(tmp_path):
    names = {"harmful": HARMFUL, "benign": BENIGN, "test_harmful": ["Poison his bread.", "Poison her tea."], "test_benign": ["Bake bread.", "Brew tea."]}
    for name, prompts in names.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return {name: tmp_path / f"{name}.txt" for name in names}


def test_a_report_on_files_and_the_probe_it_saves(small, files, tmp_path):
    model, tokenizer = small
    report = probe_report(model, tokenizer, **files, out=tmp_path / "probe", name="tiny")
    assert [r["layer"] for r in report["layers"]] == [1, 2, 3, 4] and report["layer"] in (1, 2, 3, 4)
    assert report["test_auroc"] == next(r for r in report["layers"] if r["layer"] == report["layer"])["scorecard"]["auroc"]
    assert {"text_baseline_auroc", "recall_at_fpr", "ece", "shuffled_labels_auroc"} <= set(report) and report["n_train"] == 40
    json.dumps(report)
    probe, card = load_probe(tmp_path / "probe", model=model, tokenizer=tokenizer)
    assert card["scorecard"] == report["default"]["scorecard"] and card["data"] == report["data"] and card["layers"] == [2, 3, 4]
    assert probe.n_features_in_ == 3 * 32
    with pytest.raises(FileExistsError, match="exists"):
        probe_report(model, tokenizer, **files, out=tmp_path / "probe")


def test_a_report_needs_two_classes_and_enough_of_each(small, files, tmp_path):
    files["benign"].write_text("One.\nTwo.\n", encoding="utf-8")
    with pytest.raises(ValueError, match="2 examples of the rarer class are fewer than the 5 folds"):
        probe_report(*small, **files, quick=True, out=tmp_path / "probe")
    assert not (tmp_path / "probe").exists()
