"""Looking at activations: projections to two dimensions, the refusal direction, and how far a model has drifted."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.manifold import trustworthiness

from safelab.activations import Activations

METHODS = ("pca", "lda", "umap")


def project(X: np.ndarray, groups, method: str = "pca", *, fit_on=None, seed: int = 0) -> dict:
    """Activations ``(n, width)`` -> ``xy`` ``(n, 2)`` and what of them survives.

    Parameters
    ----------
    groups
        ``(n,)`` names. Only ``"lda"`` uses them, to find the two directions that tell them apart best.
    method
        ``"pca"``: the two directions of most variance. ``"lda"``: linear discriminant analysis with a shrunk covariance
        (Ledoit and Wolf 2004). ``"umap"``: neighbourhoods kept, distances and sizes of clusters not (McInnes et al. 2018).
    fit_on
        ``(n,)`` booleans: rows that the projection is fitted on. For ``"lda"`` show the others: with more dimensions than
        rows any classes look apart where they were fitted.
    seed
        Of ``"umap"``, which then runs on one thread.

    Returns
    -------
    dict
        ``xy``; ``trustworthiness`` in 0..1 (Venna and Kaski 2001): whether the 10 nearest neighbours in the picture are near
        ones in ``X`` too; ``explained``, the share of variance on the two axes (``"pca"``, else None).

    Raises
    ------
    ValueError
        An unknown method, values that are not finite, fewer than 25 rows, or for ``"lda"`` fewer than three groups.
    """
    X, groups = np.asarray(X, dtype=np.float64), np.asarray(groups)
    rows = np.ones(len(X), bool) if fit_on is None else np.asarray(fit_on, bool)
    if method not in METHODS:
        raise ValueError(f"no projection {method!r}: there are {', '.join(METHODS)}")
    if not np.isfinite(X).all():
        raise ValueError("some activations are not finite")
    if len(X) < 25:
        raise ValueError(f"{len(X)} rows are too few to speak of neighbourhoods: give at least 25")
    if method == "lda" and len(np.unique(groups[rows])) < 3:
        raise ValueError("two axes need at least three groups to tell apart")
    explained = None
    if method == "pca":
        pca = PCA(2, random_state=seed).fit(X[rows])
        xy, explained = pca.transform(X), float(pca.explained_variance_ratio_.sum())
    elif method == "lda":
        xy = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto", n_components=2).fit(X[rows], groups[rows]).transform(X)
    else:
        from umap import UMAP  # slow to import

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a seed costs the threads
            xy = UMAP(random_state=seed).fit(X[rows]).transform(X) if not rows.all() else UMAP(random_state=seed).fit_transform(X)
    return {"xy": xy, "trustworthiness": float(trustworthiness(X, xy, n_neighbors=10)), "explained": explained}


def refusal_direction(harmful: np.ndarray, benign: np.ndarray) -> np.ndarray:
    """Unit vector from the mean of benign to the mean of harmful activations, ``(width,)`` (Arditi et al. 2024)."""
    if not len(harmful) or not len(benign):
        raise ValueError("a direction needs harmful and benign examples")
    difference = np.mean(harmful, axis=0, dtype=np.float64) - np.mean(benign, axis=0, dtype=np.float64)
    length = np.linalg.norm(difference)
    if not np.isfinite(length) or length == 0:
        raise ValueError("the two means are the same or not finite: there is no direction between them")
    return difference / length


def drift(before: Activations, after: Activations, groups, directions: dict[int, np.ndarray] | None = None) -> list[dict]:
    """How the same prompts' activations differ between two models, by layer and group.

    Parameters
    ----------
    before, after
        The same layers and prompts, in the same order.
    groups
        ``(n,)`` names.
    directions
        Layer -> unit vector, such as the refusal direction of ``before``.

    Returns
    -------
    list of dict
        ``layer``, ``group``, ``distance`` (mean of ``|after - before| / |before|``), ``cosine`` (mean), and ``along``: the
        mean move along the direction, as a share of ``|before|`` (None without one).

    Raises
    ------
    ValueError
        The two were not made of the same layers, position and number of prompts.
    """
    if before.layers != after.layers or before.position != after.position or before.values.shape != after.values.shape:
        raise ValueError("the two sets of activations differ in their layers, position or number of prompts")
    groups, rows = np.asarray(groups), []
    for layer in before.layers:
        a, b = before.layer(layer).astype(np.float64), after.layer(layer).astype(np.float64)
        norm = np.linalg.norm(a, axis=1)
        distance = np.linalg.norm(b - a, axis=1) / norm
        cosine = (a * b).sum(1) / (norm * np.linalg.norm(b, axis=1))
        along = (b - a) @ directions[layer] / norm if directions is not None else None
        for group in dict.fromkeys(groups.tolist()):
            of = groups == group
            rows.append(
                {
                    "layer": layer,
                    "group": group,
                    "distance": float(distance[of].mean()),
                    "cosine": float(cosine[of].mean()),
                    "along": float(along[of].mean()) if along is not None else None,
                }
            )
    return rows
