"""Figures of a grid of attacks and defences: Pareto plots with intervals, and heat maps. Cells are :func:`safelab.experiments.summarise_grid`'s."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safelab.plots import ARM_STYLE, SERIES_STYLE, new_figure

DEFENSE_STYLE = ARM_STYLE | {
    "constrained-sft": ("#CC79A7", "v", "Constrained-SFT"),
    "safety-mixing": ("#56B4E9", "P", "safety mixing"),
    "lisa": ("#8C6D31", "<", "Lisa"),
    "vaccine": ("#6A51A3", ">", "Vaccine"),
    "booster": ("#393B79", "h", "Booster"),
    "antidote": ("#B5651D", "d", "Antidote"),
    "safelora": ("#000000", "*", "SafeLoRA"),
    "star-dss": ("#A50026", "p", "STAR-DSS"),
}
"""Colour, marker and name: no two defences share a marker."""
NAMES = {"asr": "harmful prompts answered", "asr_strongreject": "StrongREJECT answered", "over_refusal": "everyday prompts refused", "utility": "task accuracy", "utility_balanced": "task accuracy, answers balanced",
         "step_seconds": "seconds a step", "train_seconds": "seconds of training"}  # fmt: skip


def plot_pareto(cells: list[dict], x: str, y: str = "asr", *, title: str, ax: Axes) -> Axes:
    """Two figures of each defence against each other, rates in percent with 95 % intervals; the step line joins those that no other beats on both."""
    for cell in cells:
        colour, marker, label = DEFENSE_STYLE[cell["defense"]]
        (xm, xl, xh), (ym, yl, yh) = (_span(cell[key]) for key in (x, y))
        ax.plot([xl, xh], [ym, ym], color=colour, lw=1, alpha=0.6)
        ax.plot([xm, xm], [yl, yh], color=colour, lw=1, alpha=0.6)
        ax.plot(xm, ym, marker=marker, color=colour, ms=8, mec="white", mew=0.6, ls="", label=label)
    front = pareto_front([(cost(cell, x), cost(cell, y)) for cell in cells])
    points = np.array([(_span(cells[i][x])[0], _span(cells[i][y])[0]) for i in front])
    ax.plot(*points.T, color="#7f7f7f", lw=1, ls=(0, (4, 3)), drawstyle="steps-post", zorder=0)
    if isinstance(cells[0][y], dict):
        ax.set_ylim(-4, 104)
    ax.set_xlabel(_axis_name(cells, x))
    ax.set_ylabel(_axis_name(cells, y))
    ax.set_title(title, fontsize=11, loc="left", weight="bold")
    return ax


def cost(cell: dict, key: str) -> float:
    """A figure as one to be kept low: a rate's mean or a time; task accuracy, of which more is better, with a minus."""
    value = cell[key]["mean"] if isinstance(cell[key], dict) else cell[key]
    return -value if key.startswith("utility") else value


def _span(value) -> tuple[float, float, float]:
    """Mean and 95 % interval in percent; a time has none."""
    return tuple(100 * value[k] for k in ("mean", "lo", "hi")) if isinstance(value, dict) else (value,) * 3


def _axis_name(cells: list[dict], key: str) -> str:
    value = cells[0][key]
    return f"{NAMES[key]}, % of {value['n']}" if isinstance(value, dict) else NAMES[key]


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is below on one axis without being above on the other, by rising first axis."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    front: list[int] = []
    for i in order:
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def plot_heat(cells: list[dict], rows: str, columns: str, key: str = "asr", *, title: str, ax: Axes) -> Axes:
    """One rate in percent by two fields of the cells (``"attack"``, ``"defense"``, ``"epochs"``, ``"learning_rate"``), a number in each field."""
    row_names, column_names = (list(dict.fromkeys(cell[field] for cell in cells)) for field in (rows, columns))
    values = np.full((len(row_names), len(column_names)), np.nan)
    for cell in cells:
        values[row_names.index(cell[rows]), column_names.index(cell[columns])] = 100 * cell[key]["mean"]
    ax.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=9, color="white" if value < 55 else "black")
    ax.set_xticks(range(len(column_names)), [_named(name) for name in column_names], rotation=40, ha="right")
    ax.set_yticks(range(len(row_names)), [_named(name) for name in row_names])
    ax.set_title(title, fontsize=11, loc="left", weight="bold")
    ax.grid(visible=False)
    if columns not in ("attack", "defense"):
        ax.set_xlabel(columns.replace("_", " "))
        ax.set_ylabel(rows.replace("_", " "))
    return ax


def _named(value) -> str:
    return DEFENSE_STYLE[value][2] if value in DEFENSE_STYLE else f"{value:g}" if isinstance(value, float) else str(value)


def _panels(n: int, width: float, height: float, *, most: int, beside: float = 0.0, below: float = 0.0) -> tuple[Figure, list[Axes]]:
    """``n`` panels of so many inches, at most so many in a line, and room for a legend."""
    columns = min(most, n)
    lines = -(-n // columns)
    figure, axes = new_figure(width * columns + beside, height * lines + below, columns, lines)
    for ax in axes[n:]:
        ax.remove()
    return figure, axes[:n]


def plot_compare(result: dict) -> Figure:
    """A comparison's Pareto plot for each attack: against task accuracy where the attack has a task, else over-refusal."""
    attacks = list(dict.fromkeys(cell["attack"] for cell in result["cells"]))
    figure, axes = _panels(len(attacks), 4.6, 4.4, most=5, beside=1.6)
    for attack, ax in zip(attacks, axes):
        cells = [cell for cell in result["cells"] if cell["attack"] == attack]
        plot_pareto(cells, "utility" if cells[0]["has_task"] else "over_refusal", title=attack, ax=ax)
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(list(found.values()), list(found), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def plot_ablations(result: dict) -> Figure:
    """A panel a setting of what ``safelab ablate`` writes: rates with 95 % intervals by value, in percent of held-out prompts; dashed, with no setting changed."""
    panels: dict[str, list[dict]] = {}
    for point in result["points"]:
        panels.setdefault(point["setting"], []).append(point)
    figure, axes = _panels(len(panels), 3.1, 2.9, most=4, beside=0.5, below=0.5)
    for (setting, points), ax in zip(panels.items(), axes):
        for key, (colour, marker, line), aside in zip(("asr", "asr_strongreject", "over_refusal"), SERIES_STYLE, (-0.12, 0, 0.12)):
            mean, low, high = (np.array([100 * p[key][k] for p in points]) for k in ("mean", "lo", "hi"))
            at = np.arange(len(points)) + aside
            ax.axhline(100 * result["base"][key]["mean"], color=colour, lw=1, ls=(0, (4, 3)), alpha=0.7, zorder=0)
            ax.vlines(at, low, high, color=colour, lw=1.2, alpha=0.6)
            ax.plot(at, mean, color=colour, marker=marker, ls=line, lw=1, ms=6, mec="white", mew=0.5, label=f"{NAMES[key]} (n={points[0][key]['n']})")
        ax.set_xticks(range(len(points)), [", ".join(map(str, p["value"])) if isinstance(p["value"], list) else str(p["value"]) for p in points])
        ax.set_xlim(-0.4, len(points) - 0.6)
        ax.set_ylim(-4, 104)
        ax.set_title(setting, fontsize=11, loc="left", weight="bold")
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("% of held-out prompts")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(panels)), frameon=False, fontsize=9)
    return figure


def plot_compare_heat(result: dict, key: str = "asr") -> Figure:
    """A comparison's heat map: attacks by defences or, where rates or epochs were tuned, learning rates by epochs for each defence."""
    tuned = [cell for cell in result["cells"] if cell["defense"] != "initial"]
    if not any(len({cell[field] for cell in tuned if cell["attack"] == tuned[0]["attack"]}) > 1 for field in ("learning_rate", "epochs")):
        figure, (ax,) = new_figure(9, 1.6 + 0.45 * len({cell["attack"] for cell in result["cells"]}))
        plot_heat(result["cells"], "attack", "defense", key, title=f"{NAMES[key]}, %", ax=ax)
        return figure
    panels = list(dict.fromkeys((cell["attack"], cell["defense"]) for cell in tuned))
    figure, axes = new_figure(3.6 * len(panels), 3.4, columns=len(panels))
    for (attack, defense), ax in zip(panels, axes):
        cells = [cell for cell in tuned if (cell["attack"], cell["defense"]) == (attack, defense)]
        plot_heat(cells, "learning_rate", "epochs", key, title=f"{_named(defense)}, {attack}", ax=ax)
    return figure
