"""One layer after another: a projection of its activations, the prompt behind a point, and how well a probe does there."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from safelab.activations import Activations
    from safelab.probes import HarmProbe


def layer_view(states: Activations, groups, harmful, probes: dict[int, HarmProbe], layer: int, method: str = "pca", *, seed: int = 0) -> dict:
    """A layer as a picture and as a figure.

    Parameters
    ----------
    groups, harmful
        ``(n,)`` names and labels of the prompts of ``states``, which no probe was trained on.
    probes
        Layer -> probe (:func:`safelab.widgets.layer_probes`).
    method
        See :func:`safelab.geometry.project`; ``"lda"`` is fitted on every second prompt of each group, and only the others are shown.

    Returns
    -------
    dict
        What ``project`` returns, ``shown`` ``(n,)`` booleans, ``risk`` ``(n,)`` and ``auroc`` ``{mean, lo, hi, n}``.
    """
    from safelab.geometry import project
    from safelab.probes import scorecard

    fitted = pd.Series(groups).groupby(groups).cumcount().to_numpy() % 2 == 0 if method == "lda" else None
    found = project(states.layer(layer), groups, method, fit_on=fitted, seed=seed)
    risk = probes[layer].predict_proba(states.layer(layer))[:, 1]
    return found | {"shown": np.ones(len(groups), bool) if fitted is None else ~fitted, "risk": risk, "auroc": scorecard(harmful, risk, draws=300, seed=seed)["auroc"]}


def layer_explorer(states: Activations, prompts: list[str], groups, harmful, probes: dict[int, HarmProbe], *, seed: int = 0):
    """A slider over the layers and one over the prompts, whose point is ringed and whose text is shown."""
    import ipywidgets as w

    from safelab.critics.audit import shorten
    from safelab.geometry import METHODS
    from safelab.plots import new_figure, plot_points
    from safelab.widgets.parts import named_box, png

    groups = np.asarray(groups)
    views: dict[tuple, dict] = {}  # UMAP takes seconds
    layers = [layer for layer in states.layers if layer in probes]
    layer = w.SelectionSlider(options=layers, value=layers[-1], description="layer", continuous_update=False)
    method = w.Dropdown(options=[(m.upper(), m) for m in METHODS], description="projection")
    point = w.IntSlider(0, min=0, max=len(prompts) - 1, description="prompt", continuous_update=False, layout=w.Layout(width="480px"))
    text, picture = w.HTML(), w.Image(format="png", layout=w.Layout(height="420px", width="640px", object_fit="contain"))

    def show(_=None) -> None:
        key = layer.value, method.value
        if key not in views:
            text.value = "projecting\u2026"
            views[key] = layer_view(states, groups, harmful, probes, *key, seed=seed)
        view, i = views[key], point.value
        shown, auroc = view["shown"], view["auroc"]
        figure, (ax,) = new_figure(7, 4.6)
        note = f"{view['explained']:.0%} of the variance, " if view["explained"] else "held-out half, " if not shown.all() else ""
        plot_points(view["xy"][shown], groups[shown], title=f"{method.label}, layer {layer.value} ({note}trustworthiness {view['trustworthiness']:.2f})", ax=ax)
        if shown[i]:
            ax.plot(*view["xy"][i], "o", ms=15, mfc="none", mec="black", mew=1.8)
        picture.value = png(figure)
        text.value = (
            f"<b>AUROC {auroc['mean']:.3f}</b> [{auroc['lo']:.3f}, {auroc['hi']:.3f}] of the probe at layer {layer.value}, n={auroc['n']}.<br>"
            f"Prompt {i}, {html.escape(str(groups[i]))}, risk {view['risk'][i]:.2f}: <i>{html.escape(shorten(prompts[i]))}</i>"
            + ("" if shown[i] else " (LDA was fitted on this one, so it is not shown)")
        )

    for control in (layer, method, point):
        control.observe(show, "value")
    show()
    return named_box("layer-explorer", [w.HBox([layer, method]), point, text, picture])
