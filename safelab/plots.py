"""One figure a function: data in, Axes (or Figure) out. Knows arrays and tables, nothing else."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safelab.sources import atomic_path

# Okabe and Ito's colours, told apart by colour-blind eyes; each arm also has its own marker and place
ARM_STYLE = {
    "initial": ("#7f7f7f", "s", "safe start"),
    "sft": ("#D55E00", "X", "plain SFT"),
    "constant-kl": ("#E69F00", "^", "constant KL"),
    "adaptive-probe": ("#0072B2", "o", "adaptive (probe)"),
    "adaptive-judge": ("#009E73", "D", "adaptive (judge)"),
}
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
}


class ShownFigure(Figure):
    """A figure that a notebook shows as it is: only pyplot would teach the notebook to draw a plain one."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight", dpi=STYLE["figure.dpi"])
        return buffer.getvalue()


def new_figure(width: float = 7.0, height: float = 4.0, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure in the project's style, its axes row by row (no pyplot, so it is safe in threads)."""
    with mpl.rc_context(STYLE):
        figure = ShownFigure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def plot_rates(rows: list[dict], key: str, *, title: str, ax: Axes, names: bool = True) -> Axes:
    """One rate by arm, in percent, with its 95 % interval: rows hold ``arm`` and ``key: {mean, lo, hi, n}``."""
    for y, row in enumerate(rows):
        colour, marker, _ = ARM_STYLE[row["arm"]]
        mean, lo, hi = (100 * row[key][k] for k in ("mean", "lo", "hi"))
        ax.plot([lo, hi], [y, y], color=colour, lw=2.5, solid_capstyle="butt")
        ax.plot(mean, y, marker=marker, color=colour, ms=9, mec="white", mew=0.8)
        ax.annotate(f"{mean:.0f}", (mean, y), textcoords="offset points", xytext=(0, 9), ha="center", color=colour, weight="bold")
    ax.set_yticks(range(len(rows)), [ARM_STYLE[r["arm"]][2] for r in rows] if names else [])
    ax.set_ylim(len(rows) - 0.5, -0.7)
    ax.set_xlim(-3, 103)
    ax.set_xlabel(f"% of {rows[0][key]['n']} cases, 95 % interval")
    ax.set_title(title, fontsize=11, loc="left", weight="bold")
    ax.grid(axis="y", visible=False)
    return ax


def plot_demo(demo: dict) -> Figure:
    """The demo's four rates side by side, by arm."""
    panels = (
        ("asr", "Harmful prompts answered\n(own held-out set, lower is safer)"),
        ("asr_strongreject", "StrongREJECT answered\n(lower is safer)"),
        ("over_refusal", "Everyday prompts refused\n(lower is better)"),
        ("utility", "Task accuracy\n(higher is better)"),
    )
    figure, axes = new_figure(14, 3.4, columns=len(panels))
    for index, ((key, title), ax) in enumerate(zip(panels, axes)):
        plot_rates(demo["arms"], key, title=title, ax=ax, names=index == 0)
    seeds = demo["seeds"]
    figure.suptitle(f"Fine-tuned on {demo['attack']} examples; {demo['model']}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}", fontsize=10, color="#555555")
    return figure


def plot_history(histories: dict[str, list[dict]], key: str, *, ylabel: str, ax: Axes, smooth: bool = True) -> Axes:
    """A training signal by step, one line a run, smoothed over 5 steps (raw values faint behind) or, where it is seldom measured, as it is."""
    for k, (arm, history) in enumerate(histories.items()):
        colour, marker, line = SERIES_STYLE[k % len(SERIES_STYLE)]
        label = arm
        if arm in ARM_STYLE:
            (colour, marker, label), line = ARM_STYLE[arm], "-"
        points = [(h["step"], h[key]) for h in history if key in h]
        if not points:  # plain SFT, for one, has no KL
            continue
        steps, values = np.array(points).T
        if smooth:
            ax.plot(steps, values, color=colour, alpha=0.25, lw=1)
            values = np.convolve(np.pad(values, 2, mode="edge"), np.ones(5) / 5, mode="valid")
        ax.plot(steps, values, color=colour, lw=2, ls=line, marker="" if smooth else marker, label=label)
    ax.set_xlabel("optimiser step")
    ax.set_ylabel(ylabel)
    if ax.lines:
        ax.legend(frameon=False)
    return ax


def plot_strip(values, rows, columns: list[str], *, ylabel: str, ax: Axes) -> Axes:
    """Numbers in 0..1, ``(rows, columns)``, as a strip of colours with its scale; at most 60 columns are named."""
    image = ax.imshow(np.asarray(values), cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
    every = -(-len(columns) // 60)
    names = [name.replace("\n", "\\n").replace("$", r"\$") for name in columns]  # a dollar sign would begin a formula
    ax.set_xticks(range(0, len(columns), every), names[::every], rotation=60, ha="right", fontsize=9)
    step = -(-len(rows) // 10)
    ax.set_yticks(range(0, len(rows), step), list(rows)[::step])
    ax.set_ylabel(ylabel)
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, label="risk", pad=0.01)
    return ax


def plot_risks(risks, harmful, *, ax: Axes) -> Axes:
    """Distribution of risk over a fine-tuning set: ``risks`` and ``harmful`` (0 / 1), each ``(n,)``."""
    risks, harmful = np.asarray(risks), np.asarray(harmful).astype(bool)
    bins = np.linspace(0, 1, 21)
    ax.hist(risks[~harmful], bins, color="#0072B2", alpha=0.75, label=f"benign (n={(~harmful).sum()})")
    ax.hist(risks[harmful], bins, color="#D55E00", alpha=0.75, hatch="//", edgecolor="white", label=f"harmful (n={harmful.sum()})")
    ax.set_yscale("symlog", linthresh=10)
    ax.set_xlabel("risk given by the probe")
    ax.set_ylabel("examples")
    ax.legend(frameon=False)
    return ax


# colour, marker and line of a series; lightness differs too, so that greyscale prints stay readable
SERIES_STYLE = (("#0072B2", "o", "-"), ("#D55E00", "X", "--"), ("#009E73", "D", "-."), ("#E69F00", "^", ":"), ("#CC79A7", "v", (0, (1, 1))), ("#000000", "s", (0, (5, 1))))
GROUP_STYLE = {
    "harmful": ("#D55E00", "X"),
    "twins": ("#56B4E9", "o"),
    "everyday": ("#0072B2", "s"),
    "role-play": ("#000000", "^"),
}
"""What prompts are: as in every figure, harmful is vermilion, benign blue."""


def plot_curves(rows: list[dict], x: str, curves: dict[str, list[dict]], *, xlabel: str, ylabel: str, ax: Axes, chance: float | None = None) -> Axes:
    """Figures ``{mean, lo, hi, n}`` along the rows' ``x``, one line with its 95 % band a curve; ``curves`` maps a name to one figure a row."""
    places = [row[x] for row in rows]
    at = np.arange(len(places)) if isinstance(places[0], str) else np.array(places)
    for (name, figures), (colour, marker, line) in zip(curves.items(), SERIES_STYLE):
        mean, lo, hi = (np.array([f[k] for f in figures]) for k in ("mean", "lo", "hi"))
        ax.fill_between(at, lo, hi, color=colour, alpha=0.15, lw=0)
        ax.plot(at, mean, color=colour, marker=marker, ls=line, ms=5, mec="white", mew=0.5, label=f"{name} (n={figures[0]['n']})")
    if chance is not None:
        ax.axhline(chance, color="#7f7f7f", lw=1, ls=(0, (4, 3)))
        ax.annotate("chance", (at[0], chance), xytext=(0, 3), textcoords="offset points", color="#555555", fontsize=9)
    if isinstance(places[0], str):
        ax.set_xticks(at, [p.replace("\n", "\\n") for p in places], rotation=45, ha="right")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.legend(frameon=False, fontsize=9)
    return ax


def plot_intervals(rows: list[dict], label: str, figures: dict[str, str], *, xlabel: str, ax: Axes) -> Axes:
    """Rows from top to bottom, each with one dot and 95 % interval a figure; ``figures`` maps a key of the rows to its name."""
    step = 0.7 / len(figures)
    for k, ((key, name), (colour, marker, _)) in enumerate(zip(figures.items(), SERIES_STYLE)):
        y = np.arange(len(rows)) + (k - (len(figures) - 1) / 2) * step
        mean, lo, hi = (np.array([row[key][part] for row in rows]) for part in ("mean", "lo", "hi"))
        ax.hlines(y, lo, hi, color=colour, lw=2)
        ax.plot(mean, y, ls="", marker=marker, color=colour, ms=7, mec="white", mew=0.6, label=name)
    ax.set_yticks(range(len(rows)), [row[label] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(xlabel)
    ax.grid(axis="y", visible=False)
    ax.legend(frameon=False, fontsize=9)
    return ax


def plot_calibration(y, probability, *, ax: Axes, bins: int = 10) -> Axes:
    """How often prompts given a probability are harmful, in bins of equal width, against the diagonal; a dot's number is its cases."""
    y, probability = np.asarray(y), np.asarray(probability)
    which = np.minimum((probability * bins).astype(int), bins - 1)
    points = [(probability[which == b].mean(), y[which == b].mean(), int((which == b).sum())) for b in np.unique(which)]
    ax.plot([0, 1], [0, 1], color="#7f7f7f", lw=1, ls=(0, (4, 3)))
    ax.plot([p[0] for p in points], [p[1] for p in points], color="#0072B2", marker="o", mec="white")
    for mean, share, n in points:
        ax.annotate(str(n), (mean, share), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8, color="#555555")
    ax.set(xlim=(-0.04, 1.04), ylim=(-0.06, 1.12))
    ax.set_xlabel("probability given by the probe")
    ax.set_ylabel("share that is harmful")
    return ax


def plot_points(xy, groups, *, title: str, ax: Axes) -> Axes:
    """Points ``(n, 2)`` of a projection, by group; the axes of a projection have no unit."""
    xy, groups = np.asarray(xy), np.asarray(groups)
    for k, group in enumerate(dict.fromkeys(groups.tolist())):
        colour, marker = GROUP_STYLE.get(group, SERIES_STYLE[k % len(SERIES_STYLE)][:2])
        of = groups == group
        ax.scatter(*xy[of].T, s=22, marker=marker, color=colour, alpha=0.75, lw=0.4, ec="white", label=f"{group} (n={of.sum()})")
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.legend(frameon=False, fontsize=8)
    return ax


def plot_drift(rows: list[dict], key: str, *, ylabel: str, ax: Axes) -> Axes:
    """``key`` of :func:`safelab.geometry.drift` by layer, one line a group."""
    for k, group in enumerate(dict.fromkeys(row["group"] for row in rows)):
        colour, marker = GROUP_STYLE.get(group, SERIES_STYLE[k % len(SERIES_STYLE)][:2])
        points = [(row["layer"], row[key]) for row in rows if row["group"] == group]
        ax.plot(*np.array(points).T, color=colour, marker=marker, ls=SERIES_STYLE[k % len(SERIES_STYLE)][2], ms=5, mec="white", mew=0.5, label=group)
    ax.set_xlabel("layer")
    ax.set_ylabel(ylabel)
    ax.legend(frameon=False, fontsize=9)
    return ax


def save_figure(figure: Figure, path: str | Path, numbers: dict, alt: str) -> None:
    """Write ``path`` (PNG) and beside it the numbers behind it (JSON, with the alternative text)."""
    path = Path(path)
    text = json.dumps({"alt": alt} | numbers, indent=1) + "\n"
    with atomic_path(path) as temp:
        figure.savefig(temp, format="png", metadata={"Description": alt, "Software": None})
    with atomic_path(path.with_suffix(".json")) as temp:
        temp.write_text(text, encoding="utf-8")
