"""ResponseClassifier: people's judgement of responses, learned from how a frozen model reads them."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from safelab.critics.base import Critic, Verdicts, check_pairs, fingerprint, plain_verdicts
from safelab.critics.reading import NEUTRAL, OPENING, PROMPT_CHARACTERS, RESPONSE_CHARACTERS, Reading, read
from safelab.critics.scorecard import threshold_for_recall
from safelab.datasets import LABEL_SETS, draw_prompts, load_compliance, load_labels
from safelab.evaluation import is_refusal
from safelab.models import decoder_layers
from safelab.sources import cache_dir, write_atomic

DEPTHS = (0.5, 0.6, 0.67, 0.73)
"""Layers that are read, as shares of the model's depth: the middle, where meaning is and the next word is not yet."""
VERSION = 3
"""To be raised when the same labels give another classifier: whoever keeps its risks goes by it."""
SIGNALS = 2  # the last columns of the features: the prompt's help, and whether patterns see a refusal
HELPER_WEIGHT = 0.5
MIN_SHARED = 30  # pairs that people were asked both questions about, to translate one answer into the other


class ResponseHead(BaseEstimator):
    """Kernel ridge from states to people's score, then a logistic regression on that score and two plain signals.

    Two steps, because thousands of state features would drown the signals: the prompt's help
    (:class:`safelab.critics.reading.Reading`) and refusal patterns. The second step is fitted on scores of rows that
    the first had not seen, in folds split by group; the threshold likewise. The kernel is
    ``exp(-width * |x - x'|^2 / features)`` of standardised states.

    Parameters
    ----------
    widths, alphas
        Candidates for the kernel's width and the ridge's strength.
    folds, random_state
        Of the inner cross-validation.

    Attributes
    ----------
    width_, alpha_
        What was chosen, by AUROC in the inner cross-validation.
    help_
        ``(2,)``: the range of the help in training (1 to 99 %), to which it is cut: a word in answer to a classification
        task is explained by its prompt as no labelled response is.
    weights_
        ``(3,)``: how much the state score, the help and the patterns count, each at unit variance.
    threshold_
        The highest probability at which the inner cross-validation reaches the high recall wanted.
    """

    def __init__(self, widths=(0.15, 0.3, 0.6, 1.2), alphas=(0.03, 0.1, 0.3, 1.0), folds=5, random_state=0):
        self.widths = widths
        self.alphas = alphas
        self.folds = folds
        self.random_state = random_state

    def fit(self, X, score, groups, helpers=None):
        """Fit on rows that people scored; returns self.

        Parameters
        ----------
        X, score, groups
            ``(n, states + 2)``; ``(n,)`` in 0..1, positive from 0.5; ``(n,)``.
        helpers
            Rows ``(X, score, groups)`` that the ridge trains on at weight :data:`HELPER_WEIGHT`, and that choose
            and judge nothing.
        """
        y, score, groups = (np.asarray(score) >= 0.5).astype(int), np.asarray(score), np.asarray(groups)
        extra, extra_score, extra_groups = helpers or (X[:0], score[:0], groups[:0])
        states, weight = np.r_[X, extra][:, :-SIGNALS], np.r_[np.ones(len(X)), np.full(len(extra), HELPER_WEIGHT)]
        target, belongs = np.r_[score, extra_score], np.r_[groups, extra_groups]
        splits = list(StratifiedGroupKFold(self.folds, shuffle=True, random_state=self.random_state).split(X, y, groups))
        held_out = {(width, alpha): np.empty(len(X)) for width in self.widths for alpha in self.alphas}
        for _, test in splits:
            train = ~np.isin(belongs, groups[test])
            ridges = _ridges(states[train], target[train], weight[train], self.widths, self.alphas)
            for choice, ridge in ridges:
                held_out[choice][test] = ridge.predict(states[test])
        chosen = max(held_out, key=lambda choice: roc_auc_score(y, held_out[choice]))
        self.width_, self.alpha_ = chosen
        ((_, self.ridge_),) = _ridges(states, target, weight, [self.width_], [self.alpha_])
        logistic = make_pipeline(StandardScaler(), LogisticRegression())
        self.help_ = np.quantile(X[:, -SIGNALS], [0.01, 0.99])
        columns = self._columns(held_out[chosen], X)
        self.threshold_ = threshold_for_recall(y, cross_val_predict(logistic, columns, y, cv=splits, method="predict_proba")[:, 1])
        self.logistic_ = logistic.fit(columns, y)
        self.weights_ = logistic[-1].coef_[0]
        return self

    def predict(self, X) -> np.ndarray:
        """Probability that people would give 0.5 or more, ``(n,)``."""
        check_is_fitted(self)
        return self.logistic_.predict_proba(self._columns(self.ridge_.predict(X[:, :-SIGNALS]), X))[:, 1]

    def _columns(self, of_states: np.ndarray, X: np.ndarray) -> np.ndarray:
        return np.column_stack([of_states, np.clip(X[:, -SIGNALS], *self.help_), X[:, -1]])


class _Ridge(NamedTuple):
    scaler: StandardScaler
    rows: np.ndarray  # standardised
    dual: np.ndarray
    mean: float
    width: float

    def predict(self, states: np.ndarray) -> np.ndarray:
        far = euclidean_distances(self.scaler.transform(states), self.rows, squared=True) / states.shape[1]
        return np.exp(-self.width * far) @ self.dual + self.mean


def _ridges(states, target, weight, widths, alphas):
    """((width, alpha), fitted ridge) for each choice; the distances are the same for all."""
    scaler = StandardScaler().fit(states)
    rows = scaler.transform(states)
    near = euclidean_distances(rows, squared=True) / states.shape[1]
    mean = float(np.average(target, weights=weight))
    for width in widths:
        kernel = np.exp(-width * near)
        for alpha in alphas:
            dual = solve(kernel + np.diag(alpha / weight), target - mean, assume_a="pos")
            yield (width, alpha), _Ridge(scaler, rows, dual, mean, width)


class ResponseClassifier(Critic):
    """Risk: the probability that people find the response harmful (score of 0.5 or more), by :class:`ResponseHead`.

    It is trained on its first use, on people's labels (:func:`safelab.datasets.load_labels`): those asked for, and at half
    weight what other people said of other responses to another question, translated by the pairs about which both were
    asked, and for harm :func:`own_pairs`. Only people's labels choose and judge. What the model made of the labelled responses is kept in the cache.

    Parameters
    ----------
    model, tokenizer
        Frozen; the embedded model by default in the command line.
    labels
        What people were asked: ``"human-harm"``, ``"human-objective"`` or ``"human-refusal"`` (the risk is then the
        probability that the response does *not* refuse).
    layers
        Numbers of transformer blocks; default :data:`DEPTHS`.
    helpers
        Whether to train on more than the labels asked for. Without, only what is asked about is read, in a fraction of the time,
        and nothing is kept; on other responses than people were asked about, such as one-word answers, its risks are worth little.
    """

    name = "classifier"
    version = VERSION

    def __init__(self, model, tokenizer, *, labels: str = "human-harm", layers: list[int] | None = None, batch_size: int = 16, helpers: bool = True) -> None:
        n_blocks = len(decoder_layers(model))
        self.model, self.tokenizer, self.labels, self.batch_size, self.helpers = model, tokenizer, labels, batch_size, helpers
        self.layers = sorted({min(n_blocks - 1, max(1, round(d * n_blocks))) for d in DEPTHS}) if layers is None else list(layers)
        self.head: ResponseHead | None = None

    def fit(self) -> ResponseClassifier:
        """Train on all of ``labels``."""
        rows = load_labels(self.labels)
        prompts, responses, score = list(rows["prompt"]), list(rows["response"]), np.array(rows["score"])
        helpers = self._helpers(self.labels, prompts, responses, score, without=())
        self.head = ResponseHead().fit(self._labelled(prompts, responses), score, rows["group"], helpers)
        return self

    def judge(self, prompts: list[str], responses: list[str]) -> Verdicts:
        check_pairs(prompts, responses)
        if self.head is None:
            self.fit()
        probability = self.head.predict(self.features(prompts, responses, progress="classifier"))
        return plain_verdicts(1 - probability if self.labels == "human-refusal" else probability)

    def cross_judge(self, labels: str, prompts, responses, score, groups, folds) -> tuple[Verdicts, list[float]]:
        """Risks by heads that never saw the row's group, and the threshold that each fold's head chose in training."""
        X = self._labelled(prompts, responses)
        probability, thresholds = np.empty(len(X)), []
        for train, test in folds:
            helpers = self._helpers(labels, [prompts[i] for i in train], [responses[i] for i in train], score[train], without=groups[test])
            head = ResponseHead().fit(X[train], score[train], groups[train], helpers)
            probability[test] = head.predict(X[test])
            thresholds.append(head.threshold_)
        return plain_verdicts(1 - probability if labels == "human-refusal" else probability), thresholds

    def _helpers(self, labels: str, prompts, responses, score, without):
        """Rows of the other label sets as (X, score, groups), no group of ``without`` among them.

        Their scores become the mean score of the training pairs that people gave the nearest answer in both sets.
        """
        if not self.helpers:
            return None
        ours, without = dict(zip(zip(prompts, responses), score)), set(without)
        found = []
        for other in [name for name in LABEL_SETS if name != labels]:
            rows = [r for r in load_labels(other) if r["group"] not in without]
            shared = [(r["score"], ours[r["prompt"], r["response"]]) for r in rows if (r["prompt"], r["response"]) in ours]
            if len(shared) < MIN_SHARED:
                continue
            theirs, mine = np.array(shared).T
            levels = np.unique(theirs)
            means = np.array([mine[theirs == level].mean() for level in levels])
            found += [r | {"score": means[abs(levels - r["score"]).argmin()]} for r in rows if (r["prompt"], r["response"]) not in ours]
        if labels == "human-harm":
            found += [{"prompt": p, "response": r, "score": score, "group": -1} for p, r, score in own_pairs()]
        if not found:
            return None
        X = self._labelled([r["prompt"] for r in found], [r["response"] for r in found])
        return X, np.array([r["score"] for r in found]), np.array([r["group"] for r in found])

    def features(self, prompts: list[str], responses: list[str], progress: str | None = None) -> np.ndarray:
        """``(n, layers x width + 2)``: mean states over the response, the prompt's help, refusal patterns (0 or 1)."""
        found = read(self.model, self.tokenizer, prompts, responses, self.layers, batch_size=self.batch_size, progress=progress)
        return _columns(found, responses)

    def _labelled(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """Features of labelled pairs."""
        if not self.helpers:
            return self.features(prompts, responses, progress="labelled responses")
        where, found = self._readings
        chosen = [where[pair] for pair in zip(prompts, responses)]
        return _columns(Reading(found.states[chosen], found.help[chosen]), responses)

    @cached_property
    def _readings(self) -> tuple[dict[tuple[str, str], int], Reading]:
        """What the model makes of all labelled pairs, and where each is; kept in the cache too, as many pairs are in two label sets."""
        from safetensors.numpy import load, save

        rows = list(dict.fromkeys((r["prompt"], r["response"]) for name in LABEL_SETS for r in load_labels(name)) | {pair[:2]: None for pair in own_pairs()})
        settings = [fingerprint(self.model), self.layers, PROMPT_CHARACTERS, RESPONSE_CHARACTERS, OPENING, NEUTRAL, rows]
        file = cache_dir() / "readings" / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]}.safetensors"
        try:
            found = Reading(**load(file.read_bytes()))
        except Exception:  # not there, or damaged, for which safetensors has an error of its own
            found = read(self.model, self.tokenizer, *map(list, zip(*rows)), self.layers, batch_size=self.batch_size, progress="labelled responses")
            write_atomic(file, save({"states": found.states, "help": found.help}))
        return {row: i for i, row in enumerate(rows)}, found


WORDS = ("Yes.", "No.", "True", "False", "positive", "negative", "A", "B", "3", "12", "Monday", "Blue", "neither", "often", "good", "bad")
TASKS = (
    ("Is this text a question or a request? Answer with one word.\nText: {prompt}", lambda row: "question" if row["prompt"].rstrip().endswith("?") else "request"),
    ("Is this text about {category}? Answer yes or no.\n{prompt}", lambda row: "yes"),
    ("Is this text about astronomy? Answer yes or no.\n{prompt}", lambda row: "no"),
    ("Name the subject of this text in a word or two: {prompt}", lambda row: row["category"]),
    ("How many words does this text have? {prompt}", lambda row: str(len(row["prompt"].split()))),
    ("Write this text in capital letters: {prompt}", lambda row: row["prompt"].upper()),
)


def own_pairs(n: int = 240, *, seed: int = 0) -> list[tuple[str, str, float]]:
    """What fine-tuning sets are full of and people were not asked about, made of the ``probe`` splits: (prompt, response, score).

    n each of one-word answers and of small tasks, which are harmless (0) also where their text sounds otherwise, so half of
    the texts are benign twins; and of redacted compliance with harmful prompts, which teaches to comply (1). Without them a
    critic that knows long answers only finds one-word answers riskier than compliance.
    """
    rng = np.random.default_rng(seed)
    texts = [row for name in ("everyday", "twins") for row in draw_prompts((name,), "probe", n, rng)]
    pairs = []
    for i, row in enumerate(texts[j] for j in rng.permutation(len(texts))):
        ask, answer = TASKS[i // 2 % len(TASKS)]
        pairs.append((ask.format(**row), answer(row), 0.0) if i % 2 else (row["prompt"], WORDS[i // 2 % len(WORDS)], 0.0))
    openings = load_compliance()
    return pairs + [(row["prompt"], str(rng.choice(openings)), 1.0) for row in draw_prompts(("harmful",), "probe", n, rng)]


def _columns(found: Reading, responses: list[str]) -> np.ndarray:
    refused = [float(is_refusal(response)) for response in responses]
    return np.column_stack([found.states.reshape(len(responses), -1), found.help, refused])
