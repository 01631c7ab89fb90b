"""HarmProbe: from activations to a calibrated probability that a prompt is harmful."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from safelab.sources import atomic_dir

DEFAULT_DEPTHS = (0.5, 0.67, 0.83, 1.0)
"""Layers the default probe reads, as shares of the model's depth: early layers carry wording, later ones intent."""


def default_layers(n_blocks: int) -> list[int]:
    """Layer numbers at :data:`DEFAULT_DEPTHS` of a model with ``n_blocks`` transformer blocks."""
    return sorted({max(1, round(depth * n_blocks)) for depth in DEFAULT_DEPTHS})


class HarmProbe(ClassifierMixin, BaseEstimator):
    """Standardisation and L2 logistic regression, its strength C chosen by cross-validation inside the training data.

    ``X`` is ``(examples, features)``: one layer's activations, or several layers' concatenated; ``y`` holds 1 for
    harmful and 0 for benign. Logistic regression outputs probabilities, which are used as the risk as they are.

    Parameters
    ----------
    Cs
        Candidates for the inverse regularisation strength.
    folds
        Folds of the inner cross-validation.
    random_state
        Seed of the folds' shuffling.

    Attributes
    ----------
    coef_, intercept_
        The decision function in *activation* space: ``x @ coef_ + intercept_`` is the log-odds.
    direction_
        ``coef_`` at unit length.
    C_
        The strength chosen.
    """

    def __init__(self, Cs=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1), folds=5, random_state=0):
        self.Cs = Cs
        self.folds = folds
        self.random_state = random_state

    def fit(self, X, y, groups=None):
        """Fit; ``groups`` keeps related rows (a prompt and its twin) in one fold of the inner cross-validation."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        if type_of_target(y) not in ("binary", "multiclass"):
            raise ValueError(f"Unknown label type: {type_of_target(y)}")
        self.classes_, y = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            raise ValueError(f"a probe needs examples of two classes, got {len(self.classes_)} class")
        if np.bincount(y).min() < self.folds:
            raise ValueError(f"{np.bincount(y).min()} examples of the rarer class are fewer than the {self.folds} folds: add examples")
        groups = np.arange(len(y)) if groups is None else np.asarray(groups)
        splits = list(StratifiedGroupKFold(self.folds, shuffle=True, random_state=self.random_state).split(X, y, groups))
        scaler = StandardScaler()
        logistic = LogisticRegressionCV(Cs=list(self.Cs), cv=splits, scoring="neg_log_loss", max_iter=2000, l1_ratios=(0,), use_legacy_attributes=False)
        make_pipeline(scaler, logistic).fit(X, y)
        # back from standardised to activation space, so that the direction means something there
        self.coef_ = logistic.coef_[0] / scaler.scale_
        self.intercept_ = float(logistic.intercept_[0] - scaler.mean_ @ self.coef_)
        self.direction_ = self.coef_ / max(np.linalg.norm(self.coef_), 1e-12)
        self.C_ = float(logistic.C_)
        return self

    def decision_function(self, X):
        """Log-odds of harm, ``(examples,)``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X @ self.coef_ + self.intercept_

    def predict_proba(self, X):
        """``(examples, 2)``: probability of benign, of harmful."""
        harmful = 1 / (1 + np.exp(-np.clip(self.decision_function(X), -500, 500)))
        return np.column_stack([1 - harmful, harmful])

    def predict(self, X):
        """Class labels at probability 0.5."""
        return self.classes_[(self.decision_function(X) > 0).astype(int)]


def save_probe(probe: HarmProbe, folder: str | Path, *, layers: list[int], model: str, position: str = "last", **about) -> None:
    """Write ``probe.safetensors`` and ``probe.json`` (layers, model name, whatever is given in ``about``)."""
    from safetensors.numpy import save_file

    check_is_fitted(probe)
    with atomic_dir(folder) as temp:
        save_file({"coef": probe.coef_, "intercept": np.array([probe.intercept_])}, temp / "probe.safetensors")
        card = {"layers": list(layers), "model": model, "position": position, "C": probe.C_, "width": len(probe.coef_), **about}
        (temp / "probe.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def load_probe(folder: str | Path, *, model: str) -> tuple[HarmProbe, dict]:
    """A saved probe and its card; ValueError if it was trained on another model."""
    from safetensors.numpy import load_file

    card = json.loads((Path(folder) / "probe.json").read_text(encoding="utf-8"))
    if card["model"] != model:
        raise ValueError(f"the probe in {folder} was trained on {card['model']!r}, not on {model!r}: train one for this model")
    weights = load_file(Path(folder) / "probe.safetensors")
    probe = HarmProbe()
    probe.coef_, probe.intercept_ = weights["coef"], float(weights["intercept"][0])
    probe.direction_ = probe.coef_ / np.linalg.norm(probe.coef_)
    probe.C_, probe.classes_, probe.n_features_in_ = card["C"], np.array([0, 1]), len(probe.coef_)
    return probe, card
