"""HarmProbe against scikit-learn's own contract and pipeline; probes on disk; the figures that judge a probe."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.base import clone
from sklearn.calibration import calibration_curve
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from safelab import probes
from safelab.probes import (
    KINDS,
    HarmProbe,
    data_fingerprint,
    default_layers,
    expected_calibration_error,
    load_probe,
    save_probe,
    scorecard,
)


def _clouds(n: int = 80, width: int = 6, shift: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping clouds whose features differ a thousandfold in scale and lie far from the origin."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    scale = np.geomspace(0.01, 10, width)
    return (rng.normal(size=(n, width)) + shift * y[:, None] + 5) * scale, y


@parametrize_with_checks([HarmProbe(Cs=(1.0,), folds=2), HarmProbe("difference", folds=2), HarmProbe("mlp", hidden=8, folds=2)])
def test_scikit_learns_contract(estimator, check):
    check(estimator)


# -------------------------------------------------------------------------------------------- the fit


def test_coef_in_activation_space_decides_as_the_standardised_pipeline_does():
    X, y = _clouds()
    probe = HarmProbe().fit(X, y)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=probe.C_, max_iter=5000, tol=1e-8)).fit(X, y)
    new, _ = _clouds(seed=1)
    log_odds = pipeline.decision_function(new)
    np.testing.assert_allclose(new @ probe.coef_ + probe.intercept_, log_odds, atol=1e-3)
    np.testing.assert_allclose(probe.decision_function(new), log_odds, atol=1e-3)
    np.testing.assert_allclose(probe.predict_proba(new), pipeline.predict_proba(new), atol=1e-3)
    assert (probe.predict(new) == pipeline.predict(new)).all()


def test_a_shift_or_another_unit_of_a_feature_changes_no_probability():
    X, y = _clouds()
    factor, shift = np.array([100, 0.01, 1, 3, 1, 1]), np.array([-40, 3, 0, 0, 1, 0])
    risk = HarmProbe().fit(X, y).predict_proba(X)
    np.testing.assert_allclose(HarmProbe().fit(X * factor + shift, y).predict_proba(X * factor + shift), risk, atol=1e-3)


def test_a_constant_feature_gets_no_weight():
    X, y = _clouds()
    X[:, 2] = 7.0
    probe = HarmProbe().fit(X, y)
    assert probe.coef_[2] == pytest.approx(0, abs=1e-9) and np.isfinite(probe.coef_).all()


def test_direction_is_coef_at_unit_length_and_points_to_harm():
    X, y = _clouds()
    probe = HarmProbe().fit(X, y)
    assert np.linalg.norm(probe.direction_) == pytest.approx(1)
    assert np.linalg.norm(probe.coef_) * probe.direction_ == pytest.approx(probe.coef_)
    assert (X[y == 1] @ probe.direction_).mean() > (X[y == 0] @ probe.direction_).mean()


def test_probabilities_add_up_and_stay_finite_far_out():
    X, y = _clouds()
    probe = HarmProbe().fit(X, y)
    far = np.vstack([X, 1e6 * X, -1e6 * X])
    risk = probe.predict_proba(far)
    assert np.isfinite(risk).all() and ((risk >= 0) & (risk <= 1)).all()
    np.testing.assert_allclose(risk.sum(1), 1)
    np.testing.assert_allclose(risk[len(X) :].max(1), 1, atol=1e-12)


def _by_strength(X, y, groups, scoring: str, Cs=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1), folds: int = 5) -> dict[float, float]:
    """Cross-validated score of each C, fold by fold with scikit-learn alone."""
    folds = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    pipelines = {C: make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000)) for C in Cs}
    return {C: cross_val_score(p, X, y, groups=groups, cv=folds, scoring=scoring).mean() for C, p in pipelines.items()}


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0])
def test_the_strength_is_the_best_of_the_inner_cross_validation(shift):
    X, y = _clouds(shift=shift, seed=2)
    groups = np.arange(len(y)) // 2
    probe = HarmProbe().fit(X, y, groups=groups)
    scores = _by_strength(X, y, groups, "neg_log_loss")
    assert probe.C_ == max(scores, key=scores.get)
    assert probe.cv_auroc_ == pytest.approx(_by_strength(X, y, groups, "roc_auc")[probe.C_])


def test_groups_keep_twins_together(monkeypatch):
    """Row i and row i + n are a prompt and its twin: no fold may train on one and test on the other."""
    seen = []

    class Watched(StratifiedGroupKFold):
        def split(self, *args, **kwargs):
            for train, test in super().split(*args, **kwargs):
                seen.append((train, test))
                yield train, test

    monkeypatch.setattr(probes, "StratifiedGroupKFold", Watched)
    n = 40
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(2 * n, 4)), np.repeat([1, 0], n)
    HarmProbe().fit(X, y, groups=np.r_[np.arange(n), np.arange(n)])
    assert len(seen) == 5
    for train, test in seen:
        assert not set(train % n) & set(test % n)


def test_groups_stop_repeated_rows_from_looking_like_knowledge():
    """Labels are noise, but each row comes four times: without groups the folds leak and weak regularisation wins."""
    rng = np.random.default_rng(0)
    X, y = np.tile(rng.normal(size=(40, 60)), (4, 1)), np.tile(np.arange(40) % 2, 4)
    leaking = HarmProbe().fit(X, y)
    grouped = HarmProbe().fit(X, y, groups=np.tile(np.arange(40), 4))
    assert leaking.cv_auroc_ > 0.95 and leaking.C_ == max(leaking.Cs)
    assert grouped.cv_auroc_ < 0.8 and grouped.C_ == min(grouped.Cs)


def test_a_fit_is_repeatable_and_follows_its_seed():
    X, y = _clouds(shift=0.3)
    first, again, other = (HarmProbe(random_state=seed).fit(X, y) for seed in (0, 0, 1))
    assert (first.coef_ == again.coef_).all() and first.cv_auroc_ == again.cv_auroc_
    assert first.cv_auroc_ != other.cv_auroc_


# ---------------------------------------------------------------------------------------------- the kinds


def test_a_kind_that_does_not_exist():
    with pytest.raises(ValueError, match="no probe of kind 'svm': there are logistic, difference, mlp"):
        HarmProbe("svm").fit(*_clouds())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_ranks_and_is_calibrated_on_new_data(kind):
    X, y = _clouds(600)
    new, truth = _clouds(600, seed=1)
    probe = HarmProbe(kind).fit(X, y)
    risk = probe.predict_proba(new)[:, 1]
    assert roc_auc_score(truth, risk) > (0.85 if kind != "difference" else 0.7)  # means are drowned by the widest feature
    assert expected_calibration_error(truth, risk) < 0.09
    assert abs(probe.cv_auroc_ - roc_auc_score(truth, risk)) < 0.05
    assert np.linalg.norm(probe.direction_) == pytest.approx(1)
    assert (new[truth == 1] @ probe.direction_).mean() > (new[truth == 0] @ probe.direction_).mean()


def test_difference_of_means_is_that():
    X, y = _clouds()
    probe = HarmProbe("difference").fit(X, y)
    difference = X[y == 1].mean(0) - X[y == 0].mean(0)
    assert probe.direction_ == pytest.approx(difference / np.linalg.norm(difference))
    assert probe.coef_ / probe.direction_ == pytest.approx(np.linalg.norm(probe.coef_))


def test_the_mlp_learns_what_no_line_can():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 2))
    y = (X[:, 0] * X[:, 1] > 0).astype(int)
    assert HarmProbe("mlp").fit(X, y).cv_auroc_ > 0.95 > 0.6 > HarmProbe().fit(X, y).cv_auroc_


def test_the_direction_of_an_mlp_is_its_mean_gradient():
    X, y = _clouds(100)
    probe = HarmProbe("mlp", hidden=5).fit(X, y)
    step = 1e-6 * np.eye(6) * np.abs(X).mean(0)
    gradient = np.array([((probe.decision_function(X + s) - probe.decision_function(X - s)) / (2 * s.max())).mean() for s in step])
    assert probe.direction_ == pytest.approx(gradient / np.linalg.norm(gradient), abs=1e-3)
    assert not hasattr(probe, "coef_")


@pytest.mark.parametrize("kind", ["difference", "mlp"])
def test_without_a_signal_the_probability_is_the_base_rate(kind):
    rng = np.random.default_rng(0)
    risk = HarmProbe(kind).fit(rng.normal(size=(400, 4)), np.arange(400) % 4 == 0).predict_proba(rng.normal(size=(400, 4)))[:, 1]
    assert risk.mean() == pytest.approx(0.25, abs=0.03) and risk.std() < 0.05


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "X, y, message",
    [
        (np.zeros((20, 3)), np.ones(20), "two classes, got 1 class"),
        (np.zeros((21, 3)), np.arange(21) % 3, "Only binary classification"),
        (np.eye(20), np.r_[np.ones(4), np.zeros(16)], "4 examples of the rarer class are fewer than the 5 folds"),
        (np.full((20, 3), np.nan), np.arange(20) % 2, "contains NaN"),
        (np.full((20, 3), np.inf), np.arange(20) % 2, "contains infinity"),
        (np.zeros((20, 3)), np.linspace(0, 1, 20), "Unknown label type"),
        (np.zeros((20, 3)), np.arange(19) % 2, "inconsistent numbers of samples"),
        (np.zeros(20), np.arange(20) % 2, "Expected 2D array"),
    ],
    ids=["one class", "three classes", "too few", "nan", "infinity", "risks as labels", "lengths", "one dimension"],
)
def test_what_cannot_be_fitted_is_refused(X, y, message):
    with pytest.raises(ValueError, match=message):
        HarmProbe().fit(X, y)


def test_too_few_groups_are_refused_instead_of_a_strength_picked_blindly():
    X, y = _clouds(40)
    groups = np.where(y == 1, np.arange(40) % 4 // 2, 10 + np.arange(40))  # all harmful rows in two groups
    with pytest.raises(ValueError, match="only one class"):
        HarmProbe().fit(X, y, groups=groups)


def test_a_probe_that_is_not_fitted_or_gets_another_width_says_so():
    X, y = _clouds()
    with pytest.raises(NotFittedError):
        HarmProbe().predict_proba(X)
    with pytest.raises(ValueError, match="5 features, but HarmProbe is expecting 6"):
        HarmProbe().fit(X, y).predict_proba(X[:, :5])
    with pytest.raises(NotFittedError):
        clone(HarmProbe().fit(X, y)).predict(X)


# ---------------------------------------------------------------------------------------------- on disk


@pytest.fixture
def small(tiny_model, tiny_tokenizer):
    return {"model": tiny_model("llama3"), "tokenizer": tiny_tokenizer("llama3")}


@pytest.fixture(params=KINDS)
def saved(request, tmp_path, small):
    X, y = _clouds()
    probe = HarmProbe(request.param).fit(X, y)
    save_probe(probe, tmp_path / "probe", **small, layers=[2, 4], position="mean", data="d", name="tiny", scorecard={"auroc": 1.0})
    return probe, tmp_path / "probe", X


def test_a_saved_probe_comes_back_bit_for_bit(saved, small):
    probe, folder, X = saved
    loaded, card = load_probe(folder, **small)
    assert (loaded.decision_function(X) == probe.decision_function(X)).all()
    assert (loaded.predict_proba(X) == probe.predict_proba(X)).all()
    assert (loaded.predict(X) == probe.predict(X)).all()
    assert (loaded.direction_ == probe.direction_).all() and loaded.cv_auroc_ == probe.cv_auroc_
    assert {k: card[k] for k in ("kind", "layers", "position", "join", "width", "data", "name", "scorecard")} == {
        "kind": probe.kind, "layers": [2, 4], "position": "mean", "join": "concatenated", "width": 6, "data": "d", "name": "tiny", "scorecard": {"auroc": 1.0},
    }  # fmt: skip
    assert sorted(p.name for p in folder.iterdir()) == ["probe.json", "probe.safetensors"]


def test_a_probe_is_refused_on_another_model_template_or_width(saved, small, tiny_model, tiny_tokenizer):
    _, folder, X = saved
    with pytest.raises(ValueError, match=r"trained on another model \(the weights differ: tiny\): train one for this model"):
        load_probe(folder, model=tiny_model("llama3", seed=1), tokenizer=small["tokenizer"])
    other = tiny_tokenizer("llama3")
    other.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}:"
    with pytest.raises(ValueError, match="the chat template differ"):
        load_probe(folder, model=small["model"], tokenizer=other)
    with pytest.raises(ValueError, match="expecting 6"):
        load_probe(folder, **small)[0].predict_proba(X[:, :3])


def test_a_folder_that_exists_is_not_written_over(saved, small):
    probe, folder, _ = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(FileExistsError, match="exists: give another folder"):
        save_probe(probe, folder, **small, layers=[1], data="other")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["no card", "half a card", "no weights", "half the weights", "other weights"])
def test_a_damaged_probe_is_refused(saved, small, damage):
    _, folder, _ = saved
    file = folder / ("probe.json" if "card" in damage else "probe.safetensors")
    if damage.startswith("no"):
        file.unlink()
    elif damage.startswith("half"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        save_file({"something": np.zeros(3)}, file)
    with pytest.raises(ValueError, match="is not a saved probe"):
        load_probe(folder, **small)


def test_a_probe_that_learned_nothing_comes_back_too(tmp_path, small):
    """Its coef is exactly 0, so that there is no direction to divide by."""
    probe = HarmProbe().fit(np.ones((20, 3)), np.arange(20) % 2)
    save_probe(probe, tmp_path / "probe", **small, layers=[1], data="d")
    loaded, _ = load_probe(tmp_path / "probe", **small)
    assert (loaded.direction_ == 0).all() and loaded.predict_proba(np.ones((1, 3))) == pytest.approx(0.5, abs=1e-6)


def test_nothing_is_written_for_a_probe_that_is_not_fitted_or_a_card_that_is_no_json(tmp_path, small):
    with pytest.raises(NotFittedError):
        save_probe(HarmProbe(), tmp_path / "probe", **small, layers=[1], data="d")
    with pytest.raises(TypeError):
        save_probe(HarmProbe().fit(*_clouds()), tmp_path / "probe", **small, layers=[1], data="d", note=object())
    assert list(tmp_path.iterdir()) == []


def test_a_data_fingerprint_follows_prompts_labels_and_order():
    one = data_fingerprint(["a", "b"], [1, 0])
    assert one == data_fingerprint(("a", "b"), np.array([1.0, 0.0]))
    assert len({one, data_fingerprint(["a", "c"], [1, 0]), data_fingerprint(["a", "b"], [0, 1]), data_fingerprint(["b", "a"], [0, 1])}) == 4


# ------------------------------------------------------------------------------------------- its figures


@pytest.mark.parametrize("n_blocks, layers", [(30, [15, 20, 25, 30]), (4, [2, 3, 4]), (1, [1])])
def test_the_default_layers_lie_in_the_second_half(n_blocks, layers):
    assert default_layers(n_blocks) == layers


@pytest.fixture
def scored():
    """Labels and scores of 200 cases, with ties."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    return y, np.round(np.clip(0.4 + 0.2 * y + rng.normal(0, 0.2, 200), 0, 1), 2)


FIGURES = ("auroc", "average_precision", "recall_at_1%_fpr", "recall_at_5%_fpr", "ece")


def test_a_scorecard_is_what_scikit_learn_finds(scored):
    y, scores = scored
    card = scorecard(y, scores)
    assert tuple(card) == FIGURES
    assert card["auroc"]["mean"] == pytest.approx(roc_auc_score(y, scores))
    assert card["average_precision"]["mean"] == pytest.approx(average_precision_score(y, scores))
    assert card["ece"]["mean"] == pytest.approx(expected_calibration_error(y, scores))
    json.dumps(card)


def test_figures_lie_in_their_intervals_which_narrow_with_n(scored):
    y, scores = scored
    card, few = scorecard(y, scores), scorecard(y[:40], scores[:40])
    for name in ("auroc", "average_precision"):
        assert card[name]["lo"] < card[name]["mean"] < card[name]["hi"] and card[name]["n"] == 200
        assert few[name]["hi"] - few[name]["lo"] > 1.2 * (card[name]["hi"] - card[name]["lo"])
    assert scorecard(y, scores) == card != scorecard(y, scores, seed=1)


def test_an_interval_is_that_of_a_plain_bootstrap(scored):
    y, scores = scored
    card, rng = scorecard(y, scores), np.random.default_rng(5)
    for name, metric in (("auroc", roc_auc_score), ("average_precision", average_precision_score), ("ece", expected_calibration_error)):
        drawn = [metric(y[rows], scores[rows]) for rows in rng.integers(0, 200, (1000, 200))]
        assert [card[name]["lo"], card[name]["hi"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)


def test_the_bootstrap_interval_agrees_with_hanley_and_mcneil_1982(scored):
    y, scores = scored
    found, n = scorecard(y, scores)["auroc"], 100
    a = found["mean"]
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + (n - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (n * n))
    assert (found["hi"] - found["lo"]) / (2 * 1.96) == pytest.approx(error, rel=0.2)


def test_a_bootstrap_over_few_harmful_cases_skips_draws_without_any():
    y, scores = np.array([1] + [0] * 9), np.linspace(1, 0, 10)
    assert scorecard(y, scores, draws=50)["auroc"] == {"mean": 1.0, "lo": 1.0, "hi": 1.0, "n": 10}


@pytest.mark.parametrize("y, scores, message", [([1, 1], [0.5, 0.6], "2 harmful of 2"), ([1, 0], [np.nan, 0.6], "not finite")])
def test_no_scorecard_without_two_classes_or_of_nothing(y, scores, message):
    with pytest.raises(ValueError, match=message):
        scorecard(y, scores)


@pytest.mark.parametrize("percent", [1, 5])
def test_recall_at_a_false_positive_rate_is_the_best_of_all_thresholds(scored, percent):
    y, scores = scored
    best = max(
        ((scores[y == 1] >= t).mean() for t in [*scores, 2.0] if (scores[y == 0] >= t).mean() <= percent / 100),
    )
    assert scorecard(y, scores)[f"recall_at_{percent}%_fpr"]["mean"] == pytest.approx(best)


def test_calibration_error_is_0_where_frequencies_match_and_the_gap_where_not():
    probability = np.repeat([0.25, 0.75], 40)
    y = np.r_[np.arange(40) % 4 == 0, np.arange(40) % 4 != 0].astype(int)
    assert expected_calibration_error(y, probability) == pytest.approx(0)
    assert expected_calibration_error(y, probability[::-1]) == pytest.approx(0.5)
    assert expected_calibration_error(np.array([0, 1]), np.array([1.0, 0.95])) == pytest.approx(0.475)  # the last bin holds 1.0


def test_calibration_error_is_the_weighted_gap_of_scikit_learns_curve(scored):
    y, scores = scored
    scores = scores + 1e-6  # off the bins' edges
    true, mean = calibration_curve(y, np.clip(scores, 0, 1), n_bins=10)
    counts = np.histogram(np.clip(scores, 0, 1), np.linspace(0, 1, 11))[0]
    expected = (np.abs(true - mean) * counts[counts > 0]).sum() / len(y)
    assert expected_calibration_error(y, np.clip(scores, 0, 1)) == pytest.approx(expected)


def test_scores_of_a_probe_rank_as_its_log_odds_do():
    X, y = _clouds(shift=0.5)
    probe = HarmProbe().fit(X, y)
    assert roc_auc_score(y, probe.predict_proba(X)[:, 1]) == roc_auc_score(y, probe.decision_function(X))
