"""The plain functions behind the controls, and the controls themselves, moved without a browser."""

import json

import numpy as np
import pytest

from safelab.activations import extract_activations
from safelab.experiments import DEMO_ARMS
from safelab.models import render_prompts
from safelab.probes import scorecard
from safelab.probing import user_span
from safelab.widgets import (
    disagreements,
    layer_explorer,
    layer_probes,
    layer_view,
    prompt_box,
    prompt_report,
    prompt_risk,
    schedule_designer,
    schedule_table,
    stored_results,
    threshold_explorer,
    threshold_figures,
    trade_off,
    trade_off_explorer,
)

Y = np.array([1, 1, 1, 0, 0])
RISK = np.array([0.9, 0.6, 0.2, 0.7, 0.1])


@pytest.mark.parametrize(
    ("threshold", "recall", "precision", "flagged"), [(0.0, 1, 0.6, 1), (0.6, 2 / 3, 2 / 3, 0.6), (0.65, 1 / 3, 0.5, 0.4), (0.95, 0, None, 0)]
)
def test_threshold_figures(threshold, recall, precision, flagged):
    found = threshold_figures(Y, RISK, threshold)
    assert (found["recall"], found["flagged"]) == pytest.approx((recall, flagged))
    assert np.isnan(found["precision"]) if precision is None else found["precision"] == pytest.approx(precision)


def test_disagreements_count_each_corner_once():
    table = disagreements(RISK, 1 - RISK, Y, names=("one", "other"))
    assert table["examples"].tolist() == [0, 3, 2, 0]
    assert table["harmful, people say"].tolist() == ["-", "67 %", "50 %", "-"]
    assert table["right"].tolist() == ["-", "one, 67 %", "neither more often", "-"]
    swapped = disagreements(1 - RISK, RISK, Y, names=("other", "one"))
    assert swapped["right"].tolist() == ["-", "neither more often", "one, 67 %", "-"]


def test_betas_by_example_and_by_batch():
    by_example = schedule_table(RISK, Y, beta_min=0.1, beta_max=0.9)
    assert by_example["beta"].tolist() == pytest.approx([0.1 + 0.8 * r for r in RISK])
    assert by_example["held"].tolist() == [True, True, False, True, False]
    by_batch = schedule_table(RISK, Y, beta_min=0.0, beta_max=1.0, granularity="batch", batch_size=3)
    assert by_batch["beta"].tolist() == pytest.approx([1.7 / 3] * 3 + [0.4] * 2)
    smooth = schedule_table(RISK, Y, beta_min=0.0, beta_max=1.0, granularity="batch", batch_size=3, smoothing=0.5)
    assert smooth["beta"].tolist()[-1] == pytest.approx(0.5 * 1.7 / 3 + 0.5 * 0.4)


def test_moving_the_threshold_changes_the_text():
    box = threshold_explorer(Y, RISK)
    slider, text = box.children[:2]
    before = text.value
    slider.value = 0.95
    assert text.value != before and "recall 0.0 %" in text.value and "precision undefined" in text.value


def test_the_schedule_designer_shows_what_is_held():
    box = schedule_designer(RISK, Y)
    bounds, kind, granularity = box.children[0].children
    text, picture = box.children[2], box.children[3]
    assert "67 %</b> of the harmful" in text.value and bytes(picture.value).startswith(b"\x89PNG")
    before = bytes(picture.value)
    granularity.value = "batch"
    assert "100 %</b> of the harmful" in text.value and bytes(picture.value) != before  # the mean risk is 0.5
    bounds.value = (0.0, 0.3)
    assert "<b>0 %</b> of the harmful" in text.value
    kind.value = "threshold"
    assert not box.children[1].children[0].disabled


# ------------------------------------------------------------------------------------------- prompt box


@pytest.fixture(scope="module")
def read(tiny_model, tiny_tokenizer):
    """Tiny models, and probes of layers 1, 2 and 4 of the first, trained to tell numbers from words."""
    model, tokenizer = tiny_model("llama3"), tiny_tokenizer("llama3")
    prompts = [f"{'add' if i % 2 else 'bread and'} {i} {'rivers' if i % 3 else 'salt'}" for i in range(40)]
    y = np.arange(40) % 2
    states = extract_activations(model, tokenizer, prompts, layers=[0, 1, 2, 4])
    groups = np.array(["harmful", "twins", "everyday", "role-play"] * 10)
    return {"models": {"safe": model, "attacked": tiny_model("llama3", seed=1)}, "tokenizer": tokenizer, "probes": layer_probes(states, y, np.arange(40)),
            "states": states, "prompts": prompts, "y": y, "groups": groups}  # fmt: skip


class Longest:
    """A critic whose risk is a hundredth of the characters it reads."""

    name = "longest"

    def score(self, prompts, responses):
        return np.array([len(p + r) / 100 for p, r in zip(prompts, responses)])


def test_there_is_a_probe_for_each_layer_but_the_embedding(read):
    assert list(read["probes"]) == [1, 2, 4]


def test_the_risk_of_each_layer_and_token_is_its_probes(read):
    model, tokenizer, probes = read["models"]["safe"], read["tokenizer"], read["probes"]
    text = "Bake bread, and wait"
    risk, tokens = prompt_risk(text, model, tokenizer, probes)
    before, _ = user_span(tokenizer)
    ids = render_prompts(tokenizer, [text])[0]
    assert risk.shape == (3, len(tokens)) == (3, len(ids) - before) and "".join(tokens).startswith(text)
    last = extract_activations(model, tokenizer, [text], layers=[2]).layer(2)
    assert risk[1, -1] == pytest.approx(probes[2].predict_proba(last)[0, 1], abs=1e-3)
    assert len(np.unique(risk.round(6))) > 10
    turned = prompt_risk(text, model, tokenizer, {4: probes[4], 1: probes[1]})[0]
    assert np.array_equal(turned, risk[[2, 0]])


@pytest.mark.parametrize("text", ["", "  \n"])
def test_no_prompt_is_an_error_that_says_so(read, text):
    with pytest.raises(ValueError, match="type one"):
        prompt_risk(text, read["models"]["safe"], read["tokenizer"], read["probes"])


def test_a_report_has_each_models_answer_cut_short_and_the_critics_word(read, monkeypatch):
    answers = {id(model): text for model, text in zip(read["models"].values(), ("I cannot help with that.", "Sure: " + "step " * 100))}
    monkeypatch.setattr("safelab.evaluation.generate", lambda model, tokenizer, prompts: [answers[id(model)]])
    report = prompt_report("a prompt", read["models"], read["tokenizer"], read["probes"], Longest())
    assert report["layers"] == [1, 2, 4] and report["risk"].shape == (3, len(report["tokens"]))
    safe, attacked = report["answers"]["safe"], report["answers"]["attacked"]
    assert (safe["refused"], attacked["refused"]) == (True, False)
    assert len(attacked["text"]) == 100 and attacked["text"].endswith("\u2026")
    assert safe["risk"] == pytest.approx(0.32) and attacked["risk"] > 5  # it judges the whole answer
    assert prompt_report("a prompt", read["models"], read["tokenizer"], read["probes"])["answers"]["safe"]["risk"] is None


def test_typing_and_choosing_a_prompt_changes_what_the_box_shows(read):
    box = prompt_box(read["models"], read["tokenizer"], read["probes"], Longest(), examples=["a first prompt", "<b>another</b> one"])
    chosen, typed, ask, text, picture = box.children[:5]
    assert "safelab-prompt-box" in box._dom_classes and typed.description and chosen.description
    first, seen = text.value, bytes(picture.value)
    assert "<b>safe</b>" in first and "<b>attacked</b>" in first and seen.startswith(b"\x89PNG")
    chosen.value = chosen.options[1][1]
    assert typed.value == "<b>another</b> one" and text.value != first and bytes(picture.value) != seen and not ask.disabled
    typed.value = "Mix flour and $x^ water"
    before = text.value
    ask.click()
    assert text.value != before
    typed.value = " "
    ask.click()
    assert "type one" in text.value and not ask.disabled


def test_what_a_model_says_is_shown_as_text(read, monkeypatch):
    monkeypatch.setattr("safelab.evaluation.generate", lambda *a, **k: ["<script>alert(1)</script>"])
    text = prompt_box(read["models"], read["tokenizer"], read["probes"]).children[3].value
    assert "<script>" not in text and "&lt;script&gt;" in text


# --------------------------------------------------------------------------------------- layer explorer


def test_a_view_has_the_layers_own_projection_and_auroc(read):
    views = {layer: layer_view(read["states"], read["groups"], read["y"], read["probes"], layer) for layer in (1, 4)}
    for layer, view in views.items():
        expected = read["probes"][layer].predict_proba(read["states"].layer(layer))[:, 1]
        assert np.array_equal(view["risk"], expected) and view["auroc"]["mean"] == scorecard(read["y"], expected)["auroc"]["mean"]
        assert view["xy"].shape == (40, 2) and view["shown"].all() and 0 < view["explained"] < 1
    assert not np.allclose(views[1]["xy"], views[4]["xy"])


def test_lda_shows_only_what_it_was_not_fitted_on(read):
    view = layer_view(read["states"], read["groups"], read["y"], read["probes"], 2, "lda")
    assert view["shown"].tolist() == ([False] * 4 + [True] * 4) * 5  # of each group every second one


def test_two_groups_are_not_offered_lda(read):
    box = layer_explorer(read["states"], read["prompts"], read["y"], read["y"], read["probes"])
    assert [name for name, _ in box.children[0].children[1].options] == ["PCA", "UMAP"]


def test_the_layer_explorer_shows_the_chosen_layer_and_prompt(read):
    labels = read["groups"] == "twins"  # which the probes were not trained to tell, so that layers differ
    aurocs = {k: layer_view(read["states"], read["groups"], labels, read["probes"], k)["auroc"]["mean"] for k in (1, 4)}
    assert round(aurocs[1], 3) != round(aurocs[4], 3)
    box = layer_explorer(read["states"], read["prompts"], read["groups"], labels, read["probes"])
    (layer, method), point, text, picture = box.children[0].children, *box.children[1:4]
    assert "safelab-layer-explorer" in box._dom_classes and layer.options == (1, 2, 4)
    assert f"AUROC {aurocs[4]:.3f}" in text.value and "layer 4" in text.value and read["prompts"][0] in text.value
    seen = [bytes(picture.value)]
    point.value = 7
    assert read["prompts"][7] in text.value and read["prompts"][0] not in text.value
    seen.append(bytes(picture.value))
    layer.value = 1
    assert f"AUROC {aurocs[1]:.3f}" in text.value and "layer 1" in text.value
    seen.append(bytes(picture.value))
    method.value = "lda"
    assert "not shown" not in text.value
    point.value = 8
    assert "not shown" in text.value
    seen.append(bytes(picture.value))
    assert len(set(seen)) == 4


# ------------------------------------------------------------------------------------ trade-off explorer


def rated(**rates) -> dict:
    return {k: v if k.endswith("seconds") else {"mean": v, "lo": max(v - 0.1, 0), "hi": min(v + 0.1, 1), "n": 50} for k, v in rates.items()}


CELLS = [
    {"attack": "a", "defense": "initial", "step_seconds": None} | rated(asr=0.1, utility=0.5),
    {"attack": "a", "defense": "sft"} | rated(asr=0.9, utility=0.7, step_seconds=1.0),
    {"attack": "a", "defense": "constant-kl"} | rated(asr=0.2, utility=0.5, step_seconds=3.0),
    {"attack": "a", "defense": "adaptive-probe"} | rated(asr=0.1, utility=0.7, step_seconds=2.0),
    {"attack": "b", "defense": "sft"} | rated(asr=0.3, utility=0.6, step_seconds=1.0),
]


def test_more_task_accuracy_and_less_of_all_else_is_better():
    found = trade_off(CELLS[:4], "utility", "asr")
    assert found["front"] == ["adaptive (probe)"]
    assert found["beaten"] == {"safe start": ["adaptive (probe)"], "plain SFT": ["adaptive (probe)"], "constant KL": ["safe start", "adaptive (probe)"]}
    assert "task accuracy: 70 % [60, 80]; harmful prompts answered: 10 % [0, 20]" in found["sentence"]
    timed = trade_off(CELLS[:4], "step_seconds", "asr")
    assert timed["front"] == ["plain SFT", "adaptive (probe)"] and len(timed["cells"]) == 3 and "seconds a step: 2" in timed["sentence"]


def test_equals_do_not_beat_each_other():
    assert trade_off([CELLS[1], CELLS[1] | {"defense": "lisa"}], "utility", "asr")["front"] == ["plain SFT", "Lisa"]


def test_nothing_to_compare_is_said():
    assert trade_off(CELLS[:1], "step_seconds", "asr")["sentence"].startswith("Nothing to show")


def test_the_demos_results_come_with_the_package():
    cells = stored_results()
    assert [c["defense"] for c in cells] == [*DEMO_ARMS, "adaptive-judge"]
    assert all({"mean", "lo", "hi", "n"} <= c["asr"].keys() and c["attack"] == cells[0]["attack"] for c in cells)


def test_stored_results_of_a_comparison_and_of_nothing(tmp_path):
    file = tmp_path / "compare.json"
    file.write_text(json.dumps({"rows": [], "cells": CELLS}))
    assert stored_results(file) == CELLS
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds no results"):
        stored_results(file)


def test_choosing_axes_arms_and_attack_changes_picture_and_sentence():
    box = trade_off_explorer(CELLS)
    (x, y), attack, arms, text, picture = box.children[0].children, box.children[1], box.children[2].children, *box.children[3:5]
    assert "safelab-trade-off" in box._dom_classes and (x.value, y.value) == ("utility", "asr") and dict(y.options).keys() == {
        "harmful prompts answered", "task accuracy", "seconds a step"
    }  # fmt: skip
    seen = [(text.value, bytes(picture.value))]

    def changed() -> bool:
        seen.append((text.value, bytes(picture.value)))
        return seen[-1][0] != seen[-2][0] and seen[-1][1] != seen[-2][1]

    arms[3].value = False
    assert changed() and "as: safe start" in text.value and "adaptive" not in text.value
    x.value = "step_seconds"
    assert changed() and "safe start" not in text.value
    attack.value = "b"
    assert changed()
    arms[1].value = False
    assert changed() and "Nothing to show" in text.value


def test_the_explorer_over_the_demo_agrees_with_the_table():
    text = trade_off_explorer().children[3].value
    a = {c["defense"]: c for c in stored_results()}["adaptive-probe"]
    assert f"{100 * a['asr']['mean']:.0f} % [{100 * a['asr']['lo']:.0f}, {100 * a['asr']['hi']:.0f}]" in text


# ---------------------------------------------------------------------------------------- all of them


def test_every_control_has_a_label(read):
    import ipywidgets as w

    boxes = [
        threshold_explorer(Y, RISK), schedule_designer(RISK, Y), trade_off_explorer(CELLS), prompt_box(read["models"], read["tokenizer"], read["probes"]),
        layer_explorer(read["states"], read["prompts"], read["groups"], read["y"], read["probes"]),
    ]  # fmt: skip

    def inside(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from inside(child)

    found = [c for box in boxes for c in inside(box) if not isinstance(c, (w.Box, w.HTML, w.Image, w.Output))]
    assert len(found) > 15 and not [c for c in found if not c.description]
