"""HarmProbe against scikit-learn's own contract and pipeline; probes on disk; the figures that judge a probe."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.calibration import calibration_curve
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from safelab import probes
from safelab.probes import (
    HarmProbe,
    bootstrap_auroc,
    default_layers,
    expected_calibration_error,
    load_probe,
    recall_at_fpr,
    save_probe,
)


def _clouds(n: int = 80, width: int = 6, shift: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping clouds whose features differ a thousandfold in scale and lie far from the origin."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    scale = np.geomspace(0.01, 10, width)
    return (rng.normal(size=(n, width)) + shift * y[:, None] + 5) * scale, y


@parametrize_with_checks([HarmProbe(Cs=(1.0,), folds=2)])
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
def saved(tmp_path):
    X, y = _clouds()
    probe = HarmProbe().fit(X, y)
    save_probe(probe, tmp_path / "probe", layers=[2, 4], model="tiny", position="mean", n_train=80)
    return probe, tmp_path / "probe", X


def test_a_saved_probe_comes_back_bit_for_bit(saved):
    probe, folder, X = saved
    loaded, card = load_probe(folder, model="tiny")
    assert (loaded.decision_function(X) == probe.decision_function(X)).all()
    assert (loaded.predict_proba(X) == probe.predict_proba(X)).all()
    assert (loaded.predict(X) == probe.predict(X)).all()
    assert loaded.direction_ == pytest.approx(probe.direction_) and loaded.C_ == probe.C_
    assert card == {"layers": [2, 4], "model": "tiny", "position": "mean", "C": probe.C_, "width": 6, "n_train": 80}
    assert sorted(p.name for p in folder.iterdir()) == ["probe.json", "probe.safetensors"]


def test_a_probe_is_refused_on_another_model_and_another_width(saved):
    _, folder, X = saved
    with pytest.raises(ValueError, match="trained on 'tiny', not on 'other'"):
        load_probe(folder, model="other")
    with pytest.raises(ValueError, match="expecting 6"):
        load_probe(folder, model="tiny")[0].predict_proba(X[:, :3])


def test_a_probe_that_learned_nothing_comes_back_too(tmp_path):
    """Its coef is exactly 0, so that there is no direction to divide by."""
    probe = HarmProbe().fit(np.ones((20, 3)), np.arange(20) % 2)
    save_probe(probe, tmp_path / "probe", layers=[1], model="tiny")
    loaded, _ = load_probe(tmp_path / "probe", model="tiny")
    assert (loaded.direction_ == 0).all() and loaded.predict_proba(np.ones((1, 3))) == pytest.approx(0.5, abs=1e-6)


def test_nothing_is_written_for_a_probe_that_is_not_fitted_or_a_card_that_is_no_json(tmp_path):
    with pytest.raises(NotFittedError):
        save_probe(HarmProbe(), tmp_path / "probe", layers=[1], model="tiny")
    with pytest.raises(TypeError):
        save_probe(HarmProbe().fit(*_clouds()), tmp_path / "probe", layers=[1], model="tiny", note=object())
    assert list(tmp_path.iterdir()) == []


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


def test_auroc_lies_in_its_interval_which_narrows_with_n(scored):
    y, scores = scored
    found = bootstrap_auroc(y, scores, draws=300)
    wins = np.sign(scores[y == 1][:, None] - scores[y == 0]).mean()  # P(harmful above benign) - P(below)
    assert found["mean"] == pytest.approx((wins + 1) / 2) and found["n"] == 200
    assert found["lo"] < found["mean"] < found["hi"]
    wider = bootstrap_auroc(y[:40], scores[:40], draws=300)
    assert wider["hi"] - wider["lo"] > 1.5 * (found["hi"] - found["lo"])
    assert bootstrap_auroc(y, scores, draws=300) == found != bootstrap_auroc(y, scores, draws=300, seed=1)
    json.dumps(found)


def test_the_bootstrap_interval_agrees_with_hanley_and_mcneil_1982(scored):
    y, scores = scored
    found, n = bootstrap_auroc(y, scores), 100
    a = found["mean"]
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + (n - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (n * n))
    assert (found["hi"] - found["lo"]) / (2 * 1.96) == pytest.approx(error, rel=0.2)


def test_a_bootstrap_over_few_harmful_cases_skips_draws_without_any():
    y, scores = np.array([1] + [0] * 9), np.linspace(1, 0, 10)
    assert bootstrap_auroc(y, scores, draws=50) == {"mean": 1.0, "lo": 1.0, "hi": 1.0, "n": 10}


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.05, 0.5])
def test_recall_at_a_false_positive_rate_is_the_best_of_all_thresholds(scored, fpr):
    y, scores = scored
    best = max(
        ((scores[y == 1] >= t).mean() for t in [*scores, 2.0] if (scores[y == 0] >= t).mean() <= fpr),
    )
    assert recall_at_fpr(y, scores, fpr) == pytest.approx(best)


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
