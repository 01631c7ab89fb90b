"""The classifier: what is read of a response, the head on top, and that no fold is judged by what it taught."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from safelab.critics import ResponseClassifier, classifier, scorecard
from safelab.critics.base import identity
from safelab.critics.classifier import ResponseHead, fingerprint, own_pairs
from safelab.critics.reading import NEUTRAL, OPENING, RESPONSE_CHARACTERS, read
from safelab.critics.scorecard import critic_eval, outer_folds
from safelab.datasets import load_compliance, load_prompts
from safelab.models import render_pairs

PROMPTS = ["How do I bake bread at home?", "Tell me about the history of the city.", "Hi"]
RESPONSES = ["Mix flour, water, salt and yeast, and wait.", "I cannot help with that request.", "Sure, here is a list of the steps: first, second, third. " * 4]


# ------------------------------------------------------------------------------------------- reading


def test_a_reading_is_what_one_plain_forward_pass_gives(family):
    model, tokenizer = family
    found = read(model, tokenizer, PROMPTS, RESPONSES, [1, 3], batch_size=2)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        (pair,) = render_pairs(tokenizer, [prompt], [response])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = model(torch.tensor([pair.input_ids]), output_hidden_states=True)
        for k, layer in enumerate((1, 3)):
            expected = out.hidden_states[layer][0, pair.prompt_length :].float().mean(0).numpy()
            np.testing.assert_allclose(found.states[i, k], expected, atol=0.05 * np.abs(expected).max())


def _log_probability(model, tokenizer, prompt, response):
    (pair,) = render_pairs(tokenizer, [prompt], [response])
    tokens = torch.tensor(pair.input_ids)
    with torch.no_grad():
        logs = model(tokens[None]).logits[0].float().log_softmax(-1)
    rows = torch.arange(pair.prompt_length, min(len(tokens), pair.prompt_length + OPENING))
    return logs[rows - 1, tokens[rows]].mean().item()


def test_help_is_the_gain_in_log_probability_over_a_neutral_prompt(family):
    model, tokenizer = family
    found = read(model, tokenizer, PROMPTS, RESPONSES, [1], batch_size=3)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        expected = _log_probability(model, tokenizer, prompt, response) - _log_probability(model, tokenizer, NEUTRAL, response)
        assert found.help[i] == pytest.approx(expected, abs=0.05)
    assert read(model, tokenizer, [NEUTRAL], ["Mix flour."], [1]).help[0] == pytest.approx(0, abs=0.02)


def test_a_reading_does_not_depend_on_its_batch(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama3"), tiny_tokenizer("llama3")
    one, three = (read(model, tokenizer, PROMPTS, RESPONSES, [2], batch_size=b) for b in (1, 3))
    np.testing.assert_allclose(one.states, three.states, atol=0.03)
    np.testing.assert_allclose(one.help, three.help, atol=0.05)


def test_what_lies_beyond_the_cut_is_not_read(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama3"), tiny_tokenizer("llama3")
    long = "word " * (RESPONSE_CHARACTERS // 5)
    a, b = (read(model, tokenizer, ["Hi"], [long + end], [2]) for end in ("", "an end " * 50))
    np.testing.assert_array_equal(a.states, b.states)


def test_a_model_in_training_goes_back_to_it(tiny_model, tiny_tokenizer):
    model = tiny_model("qwen2").train()
    read(model, tiny_tokenizer("qwen2"), ["Hi"], ["text"], [1])
    assert model.training


def test_an_adapter_changes_what_is_read(tiny_model, tiny_tokenizer, random_lora):
    tokenizer = tiny_tokenizer("llama3")
    plain = read(tiny_model("llama3"), tokenizer, ["Hi"], ["text"], [2])
    tuned = read(random_lora(tiny_model("llama3"), scale=0.5), tokenizer, ["Hi"], ["text"], [2])
    assert np.abs(plain.states - tuned.states).max() > 1e-3


# ---------------------------------------------------------------------------------------------- head


def _rows(n=160, width=40, seed=0, state=1.0, help_=0.0, pattern=0.0):
    """Features whose columns tell of the label as strongly as asked, and graded scores."""
    rng = np.random.default_rng(seed)
    score = rng.choice([0, 0.25, 0.5, 0.75, 1.0], n)
    y = score >= 0.5
    states = rng.normal(size=(n, width)) + state * (score[:, None] - 0.5) * rng.normal(size=width)
    signals = np.column_stack([rng.normal(size=n) + help_ * y, rng.random(n) < 0.5 - pattern * (y - 0.5)])
    return np.column_stack([states, signals]), score, np.arange(n) // 2


@pytest.mark.parametrize(("column", "settings"), [(0, {}), (1, {"state": 0.0, "help_": 3.0}), (2, {"state": 0.0, "pattern": 0.9})])
def test_the_head_finds_the_columns_that_tell(column, settings):
    X, score, groups = _rows(n=240, **settings)
    head = ResponseHead().fit(X[:160], score[:160], groups[:160])
    assert abs(head.weights_).argmax() == column
    assert roc_auc_score(score[160:] >= 0.5, head.predict(X[160:])) > 0.85


def test_the_first_step_is_kernel_ridge():
    """With weights it is scikit-learn's, on centred scores."""
    X, score, groups = _rows()
    head = ResponseHead(widths=(0.3,), alphas=(0.1,)).fit(X[:120], score[:120], groups[:120], (X[120:], score[120:], groups[120:]))
    new, _, _ = _rows(seed=1)
    scaler = StandardScaler().fit(X[:, :-2])
    weight = np.repeat([1, classifier.HELPER_WEIGHT], [120, 40])
    mean = np.average(score, weights=weight)
    ridge = KernelRidge(alpha=0.1, kernel="rbf", gamma=0.3 / 40).fit(scaler.transform(X[:, :-2]), score - mean, sample_weight=weight)
    np.testing.assert_allclose(head.ridge_.predict(new[:, :-2]), ridge.predict(scaler.transform(new[:, :-2])) + mean, atol=1e-6)


def test_helpers_of_a_groups_own_do_not_help_to_judge_it(monkeypatch):
    """Copies of all rows, as helpers, would give every answer away if they trained the fold that holds their originals."""
    X, score, groups = _rows(width=300, state=0.0)
    seen = []
    real = classifier._ridges
    monkeypatch.setattr(classifier, "_ridges", lambda states, *a: seen.append(states) or real(states, *a))
    head = ResponseHead(widths=(0.3,), alphas=(1e-6,)).fit(X, score, groups, (X, score, groups))
    assert len(seen) == 6 and len(seen[-1]) == 320 and all(len(np.unique(s, axis=0)) <= 160 * 0.85 for s in seen[:-1])
    new, s, _ = _rows(width=300, state=0.0, seed=1)
    assert (head.predict(new) >= head.threshold_)[s >= 0.5].mean() > 0.85


def test_the_threshold_comes_from_rows_the_ridge_had_not_seen():
    """On noise the ridge fits its own rows perfectly; a threshold from those would let nothing new pass."""
    X, score, groups = _rows(width=400, state=0.0)
    head = ResponseHead(widths=(0.3,), alphas=(1e-9,)).fit(X, score, groups)
    new, s, _ = _rows(width=400, state=0.0, seed=1)
    assert (head.predict(new) >= head.threshold_)[s >= 0.5].mean() > 0.85


def test_the_strength_is_chosen_inside():
    X, score, groups = _rows(width=200, state=0.3)
    assert ResponseHead(widths=(1.0,), alphas=(1e-9, 1.0)).fit(X, score, groups).alpha_ == 1.0


# ---------------------------------------------------------------------------------------- classifier


@pytest.fixture
def labels(monkeypatch, tmp_path):
    """Small label sets in which harm is a word, and the wording of groups says nothing; of our own pairs a few."""
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path))
    monkeypatch.setattr(classifier, "own_pairs", lambda: own_pairs(20))
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"Tell me about the city number {i // 2}",
            "response": f"{'bridges rivers bridges' if s >= 0.5 else 'bread flour water'} {rng.integers(100)}",
            "score": float(s),
            "scores": [float(s)],
            "label": int(s >= 0.5),
            "category": "a",
            "group": i // 2,
        }
        for i, s in enumerate(rng.choice([0, 0.25, 0.75, 1], 80))
    ]
    for module in (classifier, scorecard):
        monkeypatch.setattr(module, "load_labels", lambda name: Dataset.from_list(rows))
    return rows


@pytest.fixture
def tiny(tiny_model, tiny_tokenizer):
    return tiny_model("llama3"), tiny_tokenizer("llama3")


def test_it_learns_what_people_said(labels, tiny):
    critic = ResponseClassifier(*tiny)
    risks = critic.score(["Tell me about the city number 99"] * 2, ["bridges rivers bridges 5", "bread flour water 5"])
    assert risks[0] > 0.5 > risks[1] and ((0 <= risks) & (risks <= 1)).all()
    assert critic.judge(["a"], ["b"]).failures == {}


def test_for_refusal_labels_risk_is_not_to_refuse(labels, tiny, monkeypatch):
    monkeypatch.setattr(classifier, "own_pairs", lambda: [])  # they help with harm only
    texts = ["Tell me about the city"], ["bridges rivers bridges 5"]
    harm, refusal = (ResponseClassifier(*tiny, labels=name).score(*texts)[0] for name in ("human-harm", "human-refusal"))
    assert refusal == pytest.approx(1 - harm)


def test_its_scorecard_is_held_out_by_group(labels, tiny):
    card = critic_eval(ResponseClassifier(*tiny), "human-harm")
    assert card["auroc"]["mean"] > 0.95 and card["critic"] == "classifier" and card["n"] == 80
    json.dumps(card, allow_nan=False)


def test_no_fold_is_judged_by_a_head_that_saw_its_groups(labels, tiny, monkeypatch):
    seen = []

    class Watching(ResponseHead):
        def fit(self, X, score, groups, helpers=None):
            seen.append(set(groups) | set(helpers[2] if helpers else ()))
            return super().fit(X, score, groups, helpers)

    monkeypatch.setattr(classifier, "ResponseHead", Watching)
    y, groups = np.array([r["label"] for r in labels]), np.array([r["group"] for r in labels])
    folds = outer_folds(y, groups)
    critic = ResponseClassifier(*tiny)
    critic.cross_judge("human-harm", [r["prompt"] for r in labels], [r["response"] for r in labels], np.array([r["score"] for r in labels]), groups, folds)
    assert len(seen) == len(folds)
    for trained, (_, test) in zip(seen, folds):
        assert not trained & set(groups[test])


def test_another_questions_labels_are_translated_by_the_pairs_asked_both(labels, tiny, monkeypatch):
    other = [row | {"score": float(i % 2), "group": row["group"] + 1000 * (i >= 60), "response": row["response"] + " more" * (i >= 60)} for i, row in enumerate(labels)]
    sets = {"human-harm": labels, "human-objective": other, "human-refusal": other[:10]}
    monkeypatch.setattr(classifier, "load_labels", lambda name: Dataset.from_list(sets[name]))
    critic = ResponseClassifier(*tiny)
    texts = [r["prompt"] for r in labels], [r["response"] for r in labels]
    score = np.array([r["score"] for r in labels])
    X, translated, groups = critic._helpers("human-harm", *texts, score, without=[0, 1, other[-1]["group"]])
    own = groups == -1
    assert own.sum() == 60 and translated[own].tolist() == [score for *_, score in own_pairs(20)]
    X, translated, groups = X[~own], translated[~own], groups[~own]
    assert len(X) == len(translated) == 18 and set(groups) == {r["group"] for r in other[60:78]}
    expected = [np.mean([s for s, o in zip(score[4:60], other[4:60]) if o["score"] == level]) for level in (0, 1)]
    assert translated.tolist() == [expected[int(r["score"])] for r in other[60:78]]


def test_labels_that_say_nothing_give_chance(labels, tiny):
    rng = np.random.default_rng(1)
    for row in labels:
        row["score"] = float(rng.choice([0, 1]))
        row["label"] = int(row["score"])
    card = critic_eval(ResponseClassifier(*tiny), "human-harm")
    assert card["auroc"]["lo"] < 0.55


def test_labelled_responses_are_read_once_a_model(labels, tiny, tiny_model, monkeypatch):
    calls = []
    real = classifier.read
    monkeypatch.setattr(classifier, "read", lambda *a, **k: calls.append(1) or real(*a, **k))
    a = ResponseClassifier(*tiny).fit().head.weights_
    b = ResponseClassifier(*tiny).fit().head.weights_
    assert len(calls) == 1
    np.testing.assert_array_equal(a, b)
    ResponseClassifier(tiny_model("llama3", seed=1), tiny[1]).fit()
    assert len(calls) == 2


def test_without_helpers_only_what_is_asked_about_is_read(labels, tiny, tmp_path, monkeypatch):
    sizes = []
    real = classifier.read
    monkeypatch.setattr(classifier, "read", lambda model, tokenizer, prompts, *a, **k: sizes.append(len(prompts)) or real(model, tokenizer, prompts, *a, **k))
    alone = ResponseClassifier(*tiny, helpers=False)
    card = critic_eval(alone, "human-harm", limit=40, draws=5, baselines=False)
    assert sizes == [card["n"]] == [40] and not (tmp_path / "readings").exists()
    assert card["auroc"]["mean"] > 0.95
    assert identity(alone) != identity(ResponseClassifier(*tiny))


def test_a_critic_looks_at_its_kept_readings_once(labels, tiny, monkeypatch):
    """The file is read and the model hashed once a critic, not with every fold."""
    asked = []
    real = classifier.fingerprint
    monkeypatch.setattr(classifier, "fingerprint", lambda model: asked.append(model) or real(model))
    critic_eval(ResponseClassifier(*tiny).fit(), "human-harm", draws=5, baselines=False)
    assert len(asked) == 1


def test_a_damaged_cache_is_read_again(labels, tiny, tmp_path):
    good = ResponseClassifier(*tiny).fit().head.weights_
    (file,) = (tmp_path / "readings").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(ResponseClassifier(*tiny).fit().head.weights_, good)


def test_a_fingerprint_is_a_models_own(tiny_model):
    assert fingerprint(tiny_model("llama3")) == fingerprint(tiny_model("llama3")) != fingerprint(tiny_model("llama3", seed=1))


# ------------------------------------------------------------------------------------------- pairs of our own


def test_own_pairs_are_of_the_probe_splits_and_say_what_they_teach():
    pairs = own_pairs(30)
    everyday, twins, harmful = (set(load_prompts(name, "probe")["prompt"]) for name in ("everyday", "twins", "harmful"))
    assert len(pairs) == len({p for p, _, _ in pairs}) == 90 and pairs == own_pairs(30)
    for number, (prompt, response, score) in enumerate(pairs):
        if number < 60:
            assert score == 0 and any(text in prompt for text in everyday | twins) and len(response.split()) <= max(3, len(prompt.split()))
        else:
            assert score == 1 and prompt in harmful and response in load_compliance()
    assert "{" not in "".join(p for p, _, _ in pairs[:60])
    assert 20 < sum(any(text in prompt for text in twins) for prompt, _, _ in pairs[:60]) < 40
    assert sum(prompt in everyday | twins for prompt, _, _ in pairs[:60]) == 30  # the other thirty are small tasks


def test_help_beyond_that_of_labelled_responses_changes_nothing():
    rng = np.random.default_rng(0)
    score, X = rng.random(120), rng.normal(size=(120, 8))
    X[:, 0] += 3 * score
    head = ResponseHead().fit(X, score, np.arange(120) // 2)
    far = X[:5].copy()
    far[:, -2] = 50
    edge = X[:5].copy()
    edge[:, -2] = head.help_[1]
    np.testing.assert_array_equal(head.predict(far), head.predict(edge))
