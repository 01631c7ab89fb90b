"""What a probe proves: reports per layer, on prompts never trained on, beside the controls that could explain it away."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.stats import binomtest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tqdm.auto import tqdm

from safelab.activations import Activations, extract_activations
from safelab.datasets import PROMPT_SETS, load_prompts, load_task
from safelab.disguises import DISGUISES
from safelab.models import decoder_layers, render_prompts
from safelab.probes import HarmProbe, data_fingerprint, default_layers, probe_prompts, save_probe, scorecard

TEST_SETS = {
    "AdvBench, everyday": ("advbench", "everyday"),
    "StrongREJECT, everyday": ("strongreject", "everyday"),
    "StrongREJECT, headlines": ("strongreject", "headlines"),
    "twins": ("harmful", "twins"),
    "balanced twins": ("balanced-harmful", "balanced-twins"),
    "hard twins": ("hard-harmful", "hard-twins"),
}
"""Harmful and benign prompts of the ``eval`` splits: benchmarks against everyday requests and against a source that no
probe is trained on, then pairs of one topic, in which wording gives less and less away."""
PAIRED = tuple(name for name, (_, benign) in TEST_SETS.items() if "twins" in benign)
"""Sets of pairs: harmful prompt i and benign prompt i belong together."""


def test_sets(names=tuple(TEST_SETS), n: int | None = None, seed: int = 0) -> dict[str, tuple[list[str], np.ndarray]]:
    """Held-out sets by name: prompts and labels ``(n,)``; of each class ``n`` are drawn by ``seed`` (pairs stay pairs)."""
    sets = {}
    for name in names:
        sides = [list(load_task("eval", 200)["prompt"] if s == "headlines" else load_prompts(s, "eval")["prompt"]) for s in TEST_SETS[name]]
        if n is not None:  # the same draw from both sides of a set of pairs
            sides = [[side[i] for i in np.random.default_rng(seed).permutation(len(side))[:n]] for side in sides]
        sets[name] = (sum(sides, []), np.repeat([1, 0], [len(side) for side in sides]))
    return sets


test_sets.__test__ = False  # a loader, whatever pytest makes of its name


def text_baseline(prompts: list[str], y):
    """TF-IDF of words and pairs of words, and logistic regression: what it can do, wording does, and no model is needed for it."""
    return make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=2000)).fit(prompts, y)


def layer_curves(states: Activations, y, groups, tests: dict[str, tuple[Activations, np.ndarray]], *, kind: str = "logistic", seed: int = 0) -> list[dict]:
    """A probe per layer: ``layer``, ``cv_auroc`` (training folds), ``C`` and, under ``tests``, a scorecard for each test set."""
    rows = []
    for layer in tqdm(states.layers, desc="probes", unit="layer", leave=False):
        probe = HarmProbe(kind, random_state=seed).fit(states.layer(layer), y, groups=groups)
        cards = {name: scorecard(labels, probe.predict_proba(held_out.layer(layer))[:, 1], draws=300, seed=seed) for name, (held_out, labels) in tests.items()}
        rows.append({"layer": layer, "cv_auroc": probe.cv_auroc_, "C": getattr(probe, "C_", None), "tests": cards})
    return rows


def best_layer(rows: list[dict]) -> int:
    """The layer with the highest AUROC on training folds; no test set is looked at."""
    return max(rows, key=lambda row: row["cv_auroc"])["layer"]


def shuffled_control(X: np.ndarray, y, groups, *, repeats: int = 5, seed: int = 0) -> dict:
    """AUROC on training folds with shuffled labels, ``{mean, lo, hi, n}`` over ``repeats`` (lo and hi: the least and the most).

    Near 0.5, or the folds leak.
    """
    rng = np.random.default_rng(seed)
    found = [HarmProbe(Cs=(1e-3,), random_state=seed).fit(X, rng.permutation(y), groups=groups).cv_auroc_ for _ in range(repeats)]
    return {"mean": float(np.mean(found)), "lo": min(found), "hi": max(found), "n": repeats}


# ------------------------------------------------------------------------------------- where in the prompt


def user_span(tokenizer) -> tuple[int, int]:
    """How many tokens the chat template puts before a user's text and after it."""
    one, other = render_prompts(tokenizer, ["x", "7"])
    before = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    return before, next(i for i, (a, b) in enumerate(zip(one[::-1], other[::-1])) if a != b)


def token_curve(model, tokenizer, train: tuple, tests: dict[str, tuple], layer: int, *, shares=(0.1, 0.25, 0.5, 0.75, 1.0), seed: int = 0) -> list[dict]:
    """AUROC by how much of the prompt has been read, then by the template's tokens after it, at one layer.

    Parameters
    ----------
    train
        Prompts, labels and groups; a probe is trained at each place.
    tests
        Name -> prompts and labels.
    shares
        Shares of the user's own tokens.

    Returns
    -------
    list of dict
        In reading order: ``place`` (a share in percent, or the template's token), ``tests``: name -> AUROC with its interval.
    """
    before, after = user_span(tokenizer)
    prompts, y, groups = train
    tail = tokenizer.convert_ids_to_tokens(render_prompts(tokenizer, ["x"])[0][-after:])
    places = [(f"{share:.0%}", lambda n, s=share: before + max(1, round(s * (n - before - after))) - 1) for share in shares]
    places += [(tokenizer.convert_tokens_to_string([token]), lambda n, k=k: n - after + k) for k, token in enumerate(tail)]

    def at(states: Activations) -> list[np.ndarray]:
        lengths = np.diff(states.offsets)
        return [states.values[states.offsets[:-1] + [place(n) for n in lengths], 0] for _, place in places]

    def read(texts):
        return at(extract_activations(model, tokenizer, list(texts), layers=[layer], position="all", progress="tokens"))

    trained, held_out = read(prompts), {name: read(texts) for name, (texts, _) in tests.items()}
    rows = []
    for k, (place, _) in enumerate(places):
        probe = HarmProbe(Cs=(1e-3,), random_state=seed).fit(trained[k], y, groups=groups)
        aurocs = {name: scorecard(labels, probe.predict_proba(held_out[name][k])[:, 1], draws=300)["auroc"] for name, (_, labels) in tests.items()}
        rows.append({"place": place, "tests": aurocs})
    return rows


# --------------------------------------------------------------------------------------------- robustness


def robustness(score, harmful: list[str], benign: list[str], *, fpr: float = 0.05, disguises=DISGUISES) -> list[dict]:
    """Recall of a detector on harmful prompts in disguise, at the threshold that ``fpr`` of the plain benign prompts reach.

    Parameters
    ----------
    score
        ``prompts -> (n,)``, higher is more harmful.

    Returns
    -------
    list of dict
        ``disguise``, ``recall`` on harmful prompts and ``false_positives`` on benign prompts in the same disguise, each
        ``{mean, lo, hi, n}`` with Wilson's interval. A recall that comes with as many false positives detects the disguise.
    """
    threshold = np.quantile(score(benign), 1 - fpr, method="higher")
    rows = []
    for name, disguise in disguises.items():
        flagged = [score([disguise(p) for p in side]) > threshold for side in (harmful, benign)]
        rows.append({"disguise": name, "recall": _rate(flagged[0]), "false_positives": _rate(flagged[1])})
    return rows


def _rate(flags: np.ndarray) -> dict:
    k, n = int(flags.sum()), len(flags)
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return {"mean": k / n, "lo": float(interval.low), "hi": float(interval.high), "n": n}


# ---------------------------------------------------------------------------------------------- the report


def read_sets(model, tokenizer, train: list[str], tests: dict[str, tuple], layers: list[int], *, cache: bool = False):
    """Activations of the training prompts, and of each test set with its labels: what :func:`layer_curves` and :func:`proof` take.

    Raises
    ------
    ValueError
        A prompt is in both the training and a test set.
    """
    held_out = [p for prompts, _ in tests.values() for p in prompts]
    overlap = set(train) & set(held_out)
    if overlap:
        raise ValueError(f"{len(overlap)} prompts are in both the training and the test set, such as {min(overlap)[:60]!r}: remove them")
    every = list(dict.fromkeys([*train, *held_out]))  # sets share prompts: read each once
    states = extract_activations(model, tokenizer, every, layers=layers, cache=cache, progress="reading prompts")
    at = {prompt: i for i, prompt in enumerate(every)}

    def of(prompts) -> Activations:
        return Activations(states.values[[at[p] for p in prompts]], states.layers, states.position)

    return of(train), {name: (of(prompts), labels) for name, (prompts, labels) in tests.items()}


def proof(train: tuple, tests: dict[str, tuple], states: Activations, held_out: dict, *, seed: int = 0) -> list[dict]:
    """A probe on all layers of ``states`` and the text baseline, on each test set.

    Parameters
    ----------
    train
        Prompts, labels and groups.
    tests
        Name -> prompts and labels.
    states, held_out
        Their activations, by :func:`read_sets`.

    Returns
    -------
    list of dict
        ``test``, ``probe`` and ``text`` (scorecards), ``harmful`` and ``benign`` (counts), and for sets of pairs
        ``in_order``: by ``probe`` and ``text`` the share of pairs whose harmful prompt gets the higher probability.
    """
    prompts, y, groups = train
    probe = HarmProbe(random_state=seed).fit(states.concatenated(), y, groups=groups)
    text = text_baseline(prompts, y)
    rows = []
    for name, (texts, labels) in tests.items():
        cards = {"probe": probe.predict_proba(held_out[name][0].concatenated()), "text": text.predict_proba(texts)}
        row = {"test": name} | {who: scorecard(labels, p[:, 1], seed=seed) for who, p in cards.items()}
        row |= {"harmful": int(labels.sum()), "benign": int((1 - labels).sum())}
        if name in PAIRED:
            row["in_order"] = {who: _rate(p[labels == 1, 1] > p[labels == 0, 1]) for who, p in cards.items()}
        rows.append(row)
    return rows


def probe_report(
    model, tokenizer, harmful=None, benign=None, test_harmful=None, test_benign=None, *, seed: int = 0, quick: bool = False, out: str | Path | None = None, name: str = ""
) -> dict:
    """Fit a probe per layer, pick the layer on training folds, and test it on prompts that it never saw.

    Each set is a file or a registered name; by default training uses :func:`~safelab.probes.probe_prompts`, and the test
    is our held-out harmful prompts and StrongREJECT against the twins and everyday prompts of the ``eval`` split. Beside
    it stand a text baseline, a control with shuffled labels, and the default probe, which reads several layers. With
    ``out``, that default probe is saved there, with its scorecard.
    """
    if out is not None and Path(out).exists():  # found out now, not after the work
        raise FileExistsError(f"{out} exists: give another folder, or remove it first")
    if harmful:
        parts = [list(load_prompts(harmful)["prompt"]), list(load_prompts(benign)["prompt"])]
        train, y = sum(parts, []), np.repeat([1, 0], [len(p) for p in parts])
        groups = np.arange(len(train))
    else:
        train, y, groups = probe_prompts()
    names = ([test_harmful], [test_benign]) if test_harmful else (["harmful", "strongreject"], ["twins", "everyday"])
    sides = [sum((list(load_prompts(n, "eval" if n in PROMPT_SETS else None)["prompt"]) for n in side), []) for side in names]
    tests = {"test": (sum(sides, []), np.repeat([1, 0], [len(side) for side in sides]))}
    n_blocks = len(decoder_layers(model))
    several = default_layers(n_blocks)
    states, held_out = read_sets(model, tokenizer, train, tests, several if quick else list(range(1, n_blocks + 1)))
    rows = layer_curves(states, y, groups, held_out, seed=seed)
    best = best_layer(rows)
    card = next(r for r in rows if r["layer"] == best)["tests"]["test"]
    default = HarmProbe(random_state=seed).fit(states.select(several).concatenated(), y, groups=groups)
    (test, y_test), test_states = tests["test"], held_out["test"][0]
    text = scorecard(y_test, text_baseline(train, y).predict_proba(test)[:, 1], seed=seed)
    report = {
        "layer": best,
        "test_auroc": card["auroc"],
        "text_baseline_auroc": text["auroc"]["mean"],
        "recall_at_fpr": {f: card[f"recall_at_{p}_fpr"]["mean"] for f, p in (("0.01", "1%"), ("0.05", "5%"))},
        "ece": card["ece"]["mean"],
        "layers": [{k: v for k, v in r.items() if k != "tests"} | {"test_auroc": r["tests"]["test"]["auroc"]["mean"], "scorecard": r["tests"]["test"]} for r in rows],
        "default": {"layers": several, "scorecard": scorecard(y_test, default.predict_proba(test_states.select(several).concatenated())[:, 1], seed=seed)},
        "text_baseline": text,
        "shuffled_labels_auroc": shuffled_control(states.layer(best), y, groups, seed=seed),
        "n_train": len(train),
        "data": data_fingerprint(train, y),
        "seed": seed,
    }
    if out is not None:
        about = {"name": name, "n_train": len(train), "scorecard": report["default"]["scorecard"], "versions": {n: version(n) for n in ("safelab", "transformers", "scikit-learn")}}
        save_probe(default, out, model=model, tokenizer=tokenizer, layers=several, data=report["data"], **about)
    return report
