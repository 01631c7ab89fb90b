"""Projections, the refusal direction and drift, on points whose geometry is known."""

from __future__ import annotations

import numpy as np
import pytest

from safelab.activations import Activations
from safelab.geometry import METHODS, drift, project, refusal_direction


@pytest.fixture
def clouds():
    """Three groups of 20, far apart along one axis each, in 12 dimensions."""
    rng = np.random.default_rng(0)
    groups = np.repeat(["harmful", "twins", "everyday"], 20)
    X = rng.normal(size=(60, 12))
    X[:20, 0] += 12
    X[20:40, 1] += 12
    return X, groups


@pytest.mark.parametrize("method", METHODS)
def test_groups_far_apart_stay_apart(clouds, method):
    X, groups = clouds
    found = project(X, groups, method)
    centres = {g: found["xy"][groups == g].mean(0) for g in set(groups)}
    nearest = [min(centres, key=lambda g: np.linalg.norm(point - centres[g])) for point in found["xy"]]
    assert found["xy"].shape == (60, 2) and np.mean(nearest == groups) > 0.95
    assert 0.5 < found["trustworthiness"] <= 1
    assert (found["explained"] is not None) == (method == "pca")


def test_pca_explains_what_it_shows(clouds):
    X, groups = clouds
    found = project(X, groups)
    centred = X - X.mean(0)
    assert found["explained"] == pytest.approx((found["xy"] ** 2).sum() / (centred**2).sum())


def test_umap_follows_its_seed(clouds):
    one, again, other = (project(*clouds, "umap", seed=s)["xy"] for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)


def test_lda_finds_groups_in_noise_where_it_was_fitted_and_not_elsewhere():
    rng = np.random.default_rng(0)
    X, groups = rng.normal(size=(120, 100)), np.tile(["a", "b", "c"], 40)
    fitted = np.arange(120) < 60
    xy = project(X, groups, "lda", fit_on=fitted)["xy"]

    def spread(of):
        centres = np.array([xy[of & (groups == g)].mean(0) for g in "abc"])
        return centres.std(0).sum() / xy[of].std(0).sum()

    assert spread(fitted) > 1.5 * spread(~fitted)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(method="tsne"), "no projection 'tsne': there are pca, lda, umap"),
        (dict(X=np.full((60, 3), np.nan)), "not finite"),
        (dict(X=np.zeros((10, 3)), groups=["a"] * 10), "10 rows are too few"),
        (dict(groups=["a", "b"] * 30, method="lda"), "at least three groups"),
    ],
)
def test_what_cannot_be_projected(clouds, change, message):
    with pytest.raises(ValueError, match=message):
        project(**dict(X=clouds[0], groups=clouds[1]) | change)


def test_the_refusal_direction_points_from_benign_to_harmful():
    harmful, benign = np.array([[4.0, 1], [2, 1]]), np.array([[0.0, -3], [0, -3]])
    assert refusal_direction(harmful, benign) == pytest.approx([0.6, 0.8])
    for wrong in ((harmful, harmful), (harmful[:0], benign), (harmful * np.nan, benign)):
        with pytest.raises(ValueError):
            refusal_direction(*wrong)


def test_drift_is_measured_by_group_and_layer():
    before = Activations(np.tile(np.array([3.0, 4.0], dtype=np.float32), (4, 2, 1)), (1, 2), "last")
    moved = before.values.copy()
    moved[:2, 1] += [3, 4]  # the first group doubles at layer 2
    after = Activations(moved, (1, 2), "last")
    rows = drift(before, after, ["a", "a", "b", "b"], {1: np.array([1.0, 0]), 2: np.array([1.0, 0])})
    found = {(r["layer"], r["group"]): r for r in rows}
    assert found[2, "a"]["distance"] == pytest.approx(1) and found[2, "a"]["along"] == pytest.approx(0.6)
    assert all(r["cosine"] == pytest.approx(1) for r in rows)
    assert all(found[k]["distance"] == 0 for k in found if k != (2, "a"))
    assert drift(before, after, ["a"] * 4)[0]["along"] is None
    with pytest.raises(ValueError, match="differ in their layers"):
        drift(before, Activations(moved, (1, 3), "last"), ["a"] * 4)
