"""HarmProbe: from activations to a calibrated probability that a prompt is harmful."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data
from tqdm.auto import tqdm

from safelab.activations import extract_activations
from safelab.datasets import PROMPT_SETS, load_prompts
from safelab.models import decoder_layers
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
    cv_auroc_
        AUROC at that strength, averaged over the training folds: what layers are chosen by.
    """

    def __init__(self, Cs=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1), folds=5, random_state=0):
        self.Cs = Cs
        self.folds = folds
        self.random_state = random_state

    def fit(self, X, y, groups=None):
        """Fit; ``groups`` keeps related rows (a prompt and its twin) in one fold of the inner cross-validation."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        kind = type_of_target(y)
        if kind not in ("binary", "multiclass"):
            raise ValueError(f"Unknown label type: {kind}")
        if kind == "multiclass":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        self.classes_, y = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            raise ValueError("a probe needs examples of two classes, got 1 class")
        if np.bincount(y).min() < self.folds:
            raise ValueError(f"{np.bincount(y).min()} examples of the rarer class are fewer than the {self.folds} folds: add examples")
        groups = np.arange(len(y)) if groups is None else np.asarray(groups)
        splits = list(StratifiedGroupKFold(self.folds, shuffle=True, random_state=self.random_state).split(X, y, groups))
        if any(len(np.unique(y[rows])) < 2 for fold in splits for rows in fold):
            raise ValueError(f"some of the {self.folds} folds hold only one class, as a group stays together: add groups, or use fewer folds")
        search = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
            {"logisticregression__C": list(self.Cs)},
            cv=splits,
            scoring={"log_loss": "neg_log_loss", "auroc": "roc_auc"},
            refit="log_loss",
        ).fit(X, y)
        scaler, logistic = search.best_estimator_[0], search.best_estimator_[1]
        # back from standardised to activation space, so that the direction means something there
        self.coef_ = logistic.coef_[0] / scaler.scale_
        self.intercept_ = float(logistic.intercept_[0] - scaler.mean_ @ self.coef_)
        self.direction_ = self.coef_ / max(np.linalg.norm(self.coef_), 1e-12)
        self.C_ = float(logistic.C)
        self.cv_auroc_ = float(search.cv_results_["mean_test_auroc"][search.best_index_])
        return self

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

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
        check_is_fitted(self)
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
    probe.direction_ = probe.coef_ / max(np.linalg.norm(probe.coef_), 1e-12)
    probe.C_, probe.classes_, probe.n_features_in_ = card["C"], np.array([0, 1]), len(probe.coef_)
    return probe, card

# ------------------------------------------------------------------------------------- training data


def probe_prompts() -> tuple[list[str], np.ndarray, np.ndarray]:
    """The default training set: the ``probe`` splits of our pairs, AdvBench and everyday prompts.

    Returns prompts, labels ``(n,)`` and groups ``(n,)``: a harmful prompt and its twin are one group, so that no fold
    is tested on a pair it half knows.
    """
    sets = [load_prompts(name, "probe") for name in ("harmful", "twins", "advbench", "everyday")]
    prompts = [p for rows in sets for p in rows["prompt"]]
    labels = np.array([label for rows in sets for label in rows["label"]])
    n_pairs = len(sets[0])
    return prompts, labels, np.r_[np.arange(n_pairs), np.arange(len(prompts) - n_pairs)]


# ------------------------------------------------------------------------------------------- report


def bootstrap_auroc(y: np.ndarray, scores: np.ndarray, *, draws: int = 1000, seed: int = 0) -> dict:
    """AUROC with its 95 % percentile interval over resampled cases: ``{mean, lo, hi, n}``."""
    rng = np.random.default_rng(seed)
    drawn = []
    while len(drawn) < draws:
        rows = rng.integers(0, len(y), len(y))
        if 0 < y[rows].sum() < len(y):
            drawn.append(roc_auc_score(y[rows], scores[rows]))
    lo, hi = np.percentile(drawn, [2.5, 97.5])
    return {"mean": float(roc_auc_score(y, scores)), "lo": float(lo), "hi": float(hi), "n": len(y)}


def recall_at_fpr(y: np.ndarray, scores: np.ndarray, fpr: float) -> float:
    """Share of harmful cases above the threshold that at most ``fpr`` of the benign ones pass."""
    false, true, _ = roc_curve(y, scores, drop_intermediate=False)
    return float(true[false <= fpr].max())


def expected_calibration_error(y: np.ndarray, probability: np.ndarray, bins: int = 10) -> float:
    """Mean gap between confidence and frequency over equal-width bins, weighted by their cases (Naeini et al. 2015)."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    return float(sum(abs(probability[which == b].mean() - y[which == b].mean()) * (which == b).mean() for b in np.unique(which)))


def probe_report(model, tokenizer, harmful=None, benign=None, test_harmful=None, test_benign=None, *, seed: int = 0, quick: bool = False) -> dict:
    """Fit a probe per layer, pick the layer on training folds, and test it on prompts that it never saw.

    Each set is a file or a registered name; by default training uses :func:`probe_prompts`, and the test is our
    held-out harmful prompts and StrongREJECT against the twins and everyday prompts of the ``eval`` split.
    A text baseline (TF-IDF and logistic regression on the same prompts) stands beside it: what it can do, wording does.
    """
    if harmful:
        parts = [list(load_prompts(harmful)["prompt"]), list(load_prompts(benign)["prompt"])]
        train, y = sum(parts, []), np.repeat([1, 0], [len(p) for p in parts])
        groups = np.arange(len(train))
    else:
        train, y, groups = probe_prompts()
    names = ([test_harmful], [test_benign]) if test_harmful else (["harmful", "strongreject"], ["twins", "everyday"])
    tests = [sum((list(load_prompts(n, "eval" if n in PROMPT_SETS else None)["prompt"]) for n in side), []) for side in names]
    test, y_test = sum(tests, []), np.repeat([1, 0], [len(t) for t in tests])
    overlap = set(train) & set(test)
    if overlap:
        raise ValueError(f"{len(overlap)} prompts are in both the training and the test set, such as {next(iter(overlap))[:60]!r}: remove them")

    n_blocks = len(decoder_layers(model))
    layers = default_layers(n_blocks) if quick else list(range(1, n_blocks + 1))
    states = extract_activations(model, tokenizer, train, layers=layers, progress="training prompts")
    held_out = extract_activations(model, tokenizer, test, layers=layers, progress="test prompts")
    rows, scores = [], {}
    for layer in tqdm(layers, desc="probes", unit="layer", leave=False):
        probe = HarmProbe(random_state=seed).fit(states.layer(layer), y, groups=groups)
        scores[layer] = probe.predict_proba(held_out.layer(layer))[:, 1]
        rows.append({"layer": layer, "cv_auroc": probe.cv_auroc_, "test_auroc": float(roc_auc_score(y_test, scores[layer])), "C": probe.C_})
    best = max(rows, key=lambda r: r["cv_auroc"])["layer"]
    text = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=2000)).fit(train, y)
    return {
        "layer": best,
        "test_auroc": bootstrap_auroc(y_test, scores[best], seed=seed),
        "text_baseline_auroc": float(roc_auc_score(y_test, text.predict_proba(test)[:, 1])),
        "recall_at_fpr": {str(f): recall_at_fpr(y_test, scores[best], f) for f in (0.01, 0.05)},
        "ece": expected_calibration_error(y_test, scores[best]),
        "layers": rows,
        "n_train": len(train),
        "seed": seed,
    }
