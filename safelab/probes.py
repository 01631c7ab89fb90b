"""HarmProbe: from activations to a calibrated probability that a prompt is harmful; on disk; and its scorecard."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from safelab.activations import model_fingerprint, template_fingerprint
from safelab.datasets import load_prompts
from safelab.sources import atomic_dir

KINDS = ("logistic", "difference", "mlp")
DEFAULT_DEPTHS = (0.5, 0.67, 0.83, 1.0)
"""Layers the default probe reads, as shares of the model's depth: early layers carry wording, later ones intent."""


def default_layers(n_blocks: int) -> list[int]:
    """Layer numbers at :data:`DEFAULT_DEPTHS` of a model with ``n_blocks`` transformer blocks."""
    return sorted({max(1, round(depth * n_blocks)) for depth in DEFAULT_DEPTHS})


class HarmProbe(ClassifierMixin, BaseEstimator):
    """A classifier of activations whose probability of harm is calibrated inside the training data.

    ``X`` is ``(examples, features)``: one layer, several layers pooled or concatenated (see
    :class:`~safelab.activations.Activations`); ``y`` holds 1 for harmful and 0 for benign.

    Parameters
    ----------
    kind
        ``"logistic"``: standardisation and L2 logistic regression. It is fitted for probabilities, and its strength is
        chosen by log loss over the folds, so that they are used as they are.
        ``"difference"``: projection on the difference of the class means (Arditi et al. 2024).
        ``"mlp"``: standardisation and one hidden layer of rectified units.
        The last two are scaled to probabilities by a logistic fit to their scores on held-out folds (Platt 1999).
    Cs
        Candidates for the inverse regularisation strength of ``"logistic"``.
    hidden
        Units of ``"mlp"``.
    folds
        Folds of the inner cross-validation.
    random_state
        Seed of the folds' shuffling and of the units' first weights.

    Attributes
    ----------
    network_
        ``[(weights, bias), ...]`` from *activation* space to the log-odds of harm, rectified in between; one pair if linear.
    coef_, intercept_
        Of a linear probe: ``x @ coef_ + intercept_`` is the log-odds.
    direction_
        Where the log-odds grow, in activation space and at unit length: ``coef_``, or the mean gradient over the training data.
    C_
        The strength chosen (``"logistic"``).
    cv_auroc_
        AUROC averaged over the training folds: what layers are chosen by.
    """

    def __init__(self, kind="logistic", Cs=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1), hidden=64, folds=5, random_state=0):
        self.kind = kind
        self.Cs = Cs
        self.hidden = hidden
        self.folds = folds
        self.random_state = random_state

    def fit(self, X, y, groups=None):
        """Fit; ``groups`` keeps related rows (a prompt and its twin) in one fold of the inner cross-validation."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        if self.kind not in KINDS:
            raise ValueError(f"no probe of kind {self.kind!r}: there are {', '.join(KINDS)}")
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

        if self.kind == "logistic":
            search = GridSearchCV(
                make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
                {"logisticregression__C": list(self.Cs)},
                cv=splits,
                scoring={"log_loss": "neg_log_loss", "auroc": "roc_auc"},
                refit="log_loss",
            ).fit(X, y)
            scaler, logistic = search.best_estimator_
            self.network_ = _in_activation_space(scaler, [(logistic.coef_.T, logistic.intercept_)])
            self.C_ = float(logistic.C)
            self.cv_auroc_ = float(search.cv_results_["mean_test_auroc"][search.best_index_])
        else:
            fit_network = self._mlp if self.kind == "mlp" else _difference_of_means
            held_out, aurocs = np.empty(len(y)), []
            for train, test in splits:
                held_out[test] = _forward(fit_network(X[train], y[train]), X[test])
                aurocs.append(roc_auc_score(y[test], held_out[test]))
            self.network_ = _calibrated(fit_network(X, y), held_out, y)
            self.cv_auroc_ = float(np.mean(aurocs))
        slope = _slope(self.network_, X)
        self._describe(slope / max(np.linalg.norm(slope), 1e-12))
        return self

    def _mlp(self, X, y):
        mlp = MLPClassifier((self.hidden,), alpha=1.0, solver="lbfgs", max_iter=200, random_state=self.random_state)
        scaler = StandardScaler().fit(X)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # stopping there is part of its regularisation
            mlp.fit(scaler.transform(X), y)
        return _in_activation_space(scaler, list(zip(mlp.coefs_, mlp.intercepts_)))

    def _describe(self, direction: np.ndarray) -> None:
        self.direction_ = direction
        if len(self.network_) == 1:
            self.coef_, self.intercept_ = self.network_[0][0][:, 0], float(self.network_[0][1][0])

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def decision_function(self, X):
        """Log-odds of harm, ``(examples,)``."""
        check_is_fitted(self)
        return _forward(self.network_, validate_data(self, X, dtype=np.float64, reset=False))

    def predict_proba(self, X):
        """``(examples, 2)``: probability of benign, of harmful."""
        harmful = 1 / (1 + np.exp(-np.clip(self.decision_function(X), -500, 500)))
        return np.column_stack([1 - harmful, harmful])

    def predict(self, X):
        """Class labels at probability 0.5."""
        check_is_fitted(self)
        return self.classes_[(self.decision_function(X) > 0).astype(int)]


def _forward(network, X: np.ndarray) -> np.ndarray:
    for weights, bias in network[:-1]:
        X = np.maximum(X @ weights + bias, 0)
    weights, bias = network[-1]
    return (X @ weights + bias)[:, 0]


def _in_activation_space(scaler: StandardScaler, network):
    """The same network without its standardisation, so that directions mean something among activations."""
    (weights, bias), *rest = network
    weights = weights / scaler.scale_[:, None]
    return [(weights, bias - scaler.mean_ @ weights), *rest]


def _difference_of_means(X: np.ndarray, y: np.ndarray):
    benign, harmful = X[y == 0].mean(0), X[y == 1].mean(0)
    direction = harmful - benign
    return [(direction[:, None], np.array([-direction @ (benign + harmful) / 2]))]


def _calibrated(network, held_out: np.ndarray, y: np.ndarray):
    """The network with its output scaled to log-odds; constant where held-out scores rank the classes the wrong way round."""
    spread = max(held_out.std(), 1e-12)
    platt = LogisticRegression(C=1e3).fit(held_out[:, None] / spread, y)
    scale, shift = platt.coef_[0, 0] / spread, platt.intercept_[0]
    if scale <= 0:
        scale, shift = 0.0, np.log(y.mean() / (1 - y.mean()))
    weights, bias = network[-1]
    return [*network[:-1], (weights * scale, bias * scale + shift)]


def _slope(network, X: np.ndarray) -> np.ndarray:
    """Gradient of the log-odds, averaged over ``X``."""
    weights, bias = network[0]
    if len(network) == 1:
        return weights[:, 0]
    return weights @ (network[1][0][:, 0] * (X @ weights + bias > 0).mean(0))


# ------------------------------------------------------------------------------------------- on disk


def save_probe(
    probe: HarmProbe, folder: str | Path, *, model, tokenizer, layers: list[int], data: str, position: str = "last", join: str = "concatenated", **about
) -> None:
    """Write ``probe.safetensors`` and ``probe.json``.

    Parameters
    ----------
    model, tokenizer
        What the activations came from: the hash of its weights and of its chat template are kept.
    layers, position, join
        How the features were made of activations (``join``: "concatenated" or "pooled").
    data
        Hash of the training data (:func:`data_fingerprint`).
    about
        What else the card shall say, such as ``name`` and ``scorecard``; JSON types.

    Raises
    ------
    FileExistsError
        The folder exists.
    """
    from safetensors.numpy import save_file

    check_is_fitted(probe)
    if Path(folder).exists():
        raise FileExistsError(f"{folder} exists: give another folder, or remove it first")
    card = {
        "kind": probe.kind,
        "layers": list(layers),
        "position": position,
        "join": join,
        "width": probe.n_features_in_,
        "model": model_fingerprint(model),
        "template": template_fingerprint(tokenizer),
        "data": data,
        "C": getattr(probe, "C_", None),
        "cv_auroc": probe.cv_auroc_,
        **about,
    }
    tensors = {f"{part}.{i}": a for i, pair in enumerate(probe.network_) for part, a in zip(("weights", "bias"), pair)}
    with atomic_dir(folder) as temp:
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()} | {"direction": probe.direction_}, temp / "probe.safetensors")
        (temp / "probe.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def load_probe(folder: str | Path, *, model, tokenizer) -> tuple[HarmProbe, dict]:
    """A saved probe and its card.

    Raises
    ------
    ValueError
        The folder holds no probe, or one trained on other weights or another chat template.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        card = json.loads((Path(folder) / "probe.json").read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / "probe.safetensors")
        network = [(tensors[f"weights.{i}"], tensors[f"bias.{i}"]) for i in range(len(tensors) // 2)]
        probe = HarmProbe(card["kind"])
        trained_on = {"model": card["model"], "template": card["template"]}
        probe.C_, probe.cv_auroc_, probe.n_features_in_ = card["C"], card["cv_auroc"], card["width"]
        direction = tensors["direction"]
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a saved probe ({type(error).__name__}: {error}): probe.json and probe.safetensors are needed") from error
    here = {"model": model_fingerprint(model), "template": template_fingerprint(tokenizer)}
    if trained_on != here:
        what = "the weights" if trained_on["model"] != here["model"] else "the chat template"
        raise ValueError(f"the probe in {folder} was trained on another model ({what} differ: {card.get('name', 'unnamed')}): train one for this model")
    probe.network_, probe.classes_ = network, np.array([0, 1])
    probe._describe(direction)
    return probe, card


def data_fingerprint(prompts: list[str], labels) -> str:
    """Hash of a training set: its prompts and labels, in order."""
    return hashlib.sha256(json.dumps([list(prompts), [int(label) for label in labels]]).encode()).hexdigest()[:32]


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


# ----------------------------------------------------------------------------------------- scorecard


def scorecard(y, probability, *, draws: int = 1000, seed: int = 0) -> dict:
    """What a probe's probabilities are worth: each figure with its 95 % percentile interval over resampled cases.

    Returns
    -------
    dict
        ``auroc``, ``average_precision``, ``recall_at_1%_fpr``, ``recall_at_5%_fpr`` and ``ece`` (10 bins of equal
        width), each ``{mean, lo, hi, n}``. Draws without both classes are left out.

    Raises
    ------
    ValueError
        Cases of one class only, or probabilities that are not numbers.
    """
    y, p = np.asarray(y), np.asarray(probability, dtype=float)
    if not 0 < y.sum() < len(y):
        raise ValueError(f"a scorecard needs harmful and benign cases, got {int(y.sum())} harmful of {len(y)}")
    if not np.isfinite(p).all():
        raise ValueError("some probabilities are not finite")
    order = np.argsort(-p, kind="stable")
    y, p = y[order], p[order]
    # a draw is a weight for every case; the first row is the sample itself
    rng = np.random.default_rng(seed)
    weights = np.vstack([np.ones(len(y)), rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=draws)])
    steps = np.r_[np.flatnonzero(np.diff(p)), len(p) - 1]  # cases with equal scores pass a threshold together
    true, false = (weights * y).cumsum(1)[:, steps], (weights * (1 - y)).cumsum(1)[:, steps]
    keep = (true[:, -1] > 0) & (false[:, -1] > 0)
    weights, true, false = weights[keep], true[keep], false[keep]
    harmful, benign = true[:, -1:], false[:, -1:]
    more_true, more_false = np.diff(true, axis=1, prepend=0), np.diff(false, axis=1, prepend=0)
    bins = np.minimum((p * 10).astype(int), 9)
    values = {
        "auroc": (more_false * (true - more_true / 2)).sum(1) / (harmful * benign)[:, 0],
        "average_precision": (more_true * true / np.maximum(true + false, 1)).sum(1) / harmful[:, 0],
        "recall_at_1%_fpr": (np.where(false <= 0.01 * benign, true, 0) / harmful).max(1),
        "recall_at_5%_fpr": (np.where(false <= 0.05 * benign, true, 0) / harmful).max(1),
        "ece": sum(np.abs((weights * (p - y))[:, bins == b].sum(1)) for b in range(10)) / len(y),
    }
    intervals = {name: np.percentile(v[1:], [2.5, 97.5]) if len(v) > 1 else (v[0], v[0]) for name, v in values.items()}
    return {name: {"mean": float(v[0]), "lo": float(intervals[name][0]), "hi": float(intervals[name][1]), "n": len(y)} for name, v in values.items()}


def expected_calibration_error(y: np.ndarray, probability: np.ndarray, bins: int = 10) -> float:
    """Mean gap between confidence and frequency over equal-width bins, weighted by their cases (Naeini et al. 2015)."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    return float(sum(abs(probability[which == b].mean() - y[which == b].mean()) * (which == b).mean() for b in np.unique(which)))
