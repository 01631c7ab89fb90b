"""Stored results against each other: what a defence keeps, and what that costs."""

from __future__ import annotations

import html
import json
from pathlib import Path


def stored_results(file: str | Path | None = None) -> list[dict]:
    """What ``safelab demo`` or ``safelab compare --json`` wrote -> its cells: ``attack``, ``defense``, rates with intervals, times.

    Without ``file``: the demo's results that come with the package.

    Raises
    ------
    ValueError
        A file that holds neither.
    """
    from safelab.sources import figures_dir

    file = Path(file or figures_dir() / "demo.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(found, dict) and "cells" in found:
        return found["cells"]
    if isinstance(found, dict) and "arms" in found:
        return [{"attack": found["attack"], "defense": arm["arm"]} | arm for arm in found["arms"]]
    raise ValueError(f"{file} holds no results: expected what `safelab demo` or `safelab compare --json` writes")


def trade_off(cells: list[dict], x: str, y: str) -> dict:
    """Which defences no other beats on both of two figures, and a sentence that says so.

    Parameters
    ----------
    cells
        Of one attack (:func:`stored_results`).
    x, y
        Keys of the cells: a rate, or a time. Of ``"utility"`` more is better, of all others less.

    Returns
    -------
    dict
        ``cells`` that have both figures (the safe start has no time), ``front`` and ``beaten`` (names; each beaten one -> by whom), ``sentence``.
    """
    from safelab.plots_grid import DEFENSE_STYLE, cost

    cells = [c for c in cells if c.get(x) is not None and c.get(y) is not None]
    at = [(cost(c, x), cost(c, y)) for c in cells]
    names = [DEFENSE_STYLE[c["defense"]][2] for c in cells]
    beaten = {}
    for name, own in zip(names, at):
        better = [other for other, q in zip(names, at) if q != own and q[0] <= own[0] and q[1] <= own[1]]
        if better:
            beaten[name] = better
    front = [name for name in names if name not in beaten]
    figures = {name: f"{name} ({_said(c[x], x)}; {_said(c[y], y)})" for name, c in zip(names, cells)}
    sentence = f"No other is at least as good on both as: {', '.join(figures[name] for name in front)}."
    sentence += "".join(f" Beaten: {figures[name]}, by {' and '.join(by)}." for name, by in beaten.items())
    return {"cells": cells, "front": front, "beaten": beaten, "sentence": sentence if cells else "Nothing to show: choose an arm that has both figures."}


def _said(value, key: str) -> str:
    from safelab.plots_grid import NAMES

    if isinstance(value, dict):
        return "{0}: {mean:.0f} % [{lo:.0f}, {hi:.0f}]".format(NAMES[key], **{k: 100 * value[k] for k in ("mean", "lo", "hi")})
    return f"{NAMES[key]}: {value:.3g}"


def trade_off_explorer(cells: list[dict] | None = None):
    """Two figures to choose, an attack and its arms: points with intervals, and a sentence; without ``cells`` the demo's."""
    import ipywidgets as w

    from safelab.plots import new_figure
    from safelab.plots_grid import DEFENSE_STYLE, NAMES, plot_pareto
    from safelab.widgets.parts import named_box, png

    cells = stored_results() if cells is None else cells
    axes = {name: key for key, name in NAMES.items() if any(c.get(key) is not None for c in cells)}
    x = w.Dropdown(options=axes, value="utility" if "utility" in axes.values() else next(iter(axes.values())), description="across")
    y = w.Dropdown(options=axes, description="up")
    attack = w.Dropdown(options=list(dict.fromkeys(c["attack"] for c in cells)), description="attack", layout=w.Layout(width="480px"))
    arms = {name: w.Checkbox(True, description=DEFENSE_STYLE[name][2], indent=False, layout=w.Layout(width="150px")) for name in dict.fromkeys(c["defense"] for c in cells)}
    text, picture = w.HTML(), w.Image(format="png", layout=w.Layout(height="420px", width="700px", object_fit="contain"))

    def show(_=None) -> None:
        found = trade_off([c for c in cells if c["attack"] == attack.value and arms[c["defense"]].value], x.value, y.value)
        text.value = html.escape(found["sentence"])
        figure, (ax,) = new_figure(8, 4.6)
        if found["cells"]:
            plot_pareto(found["cells"], x.value, y.value, title="95 % intervals; the line joins what no other beats", ax=ax)
            figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
        picture.value = png(figure)

    for control in (x, y, attack, *arms.values()):
        control.observe(show, "value")
    show()
    return named_box("trade-off", [w.HBox([x, y]), attack, w.HBox(list(arms.values()), layout=w.Layout(flex_flow="row wrap")), text, picture])
