"""Controls for notebooks: ipywidgets fronts, and beside each the plain function that it calls."""

from __future__ import annotations

import numpy as np
import pandas as pd


def threshold_figures(y: np.ndarray, risk: np.ndarray, threshold: float) -> dict[str, float]:
    """Recall, precision and the share flagged where ``risk >= threshold``; ``y`` ``(n,)`` is 1 for harmful."""
    flagged = np.asarray(risk) >= threshold
    caught = int((flagged & (np.asarray(y) == 1)).sum())
    return {
        "recall": caught / max(int(np.sum(y)), 1),
        "precision": caught / flagged.sum() if flagged.any() else float("nan"),
        "flagged": float(flagged.mean()),
    }


def threshold_explorer(y: np.ndarray, risk: np.ndarray):
    """A slider for the threshold, and what it does to recall and precision."""
    import ipywidgets as w

    slider = w.FloatSlider(0.5, min=0.0, max=1.0, step=0.01, description="threshold", continuous_update=False, readout_format=".2f")
    text = w.HTML()

    def show(_=None) -> None:
        figures = threshold_figures(y, risk, slider.value)
        text.value = (
            f"<b>recall {100 * figures['recall']:.1f} %</b> of {int(np.sum(y))} harmful · "
            f"<b>precision {100 * figures['precision']:.1f} %</b> · {100 * figures['flagged']:.1f} % of {len(y)} flagged"
        )

    slider.observe(show, "value")
    show()
    return w.VBox([slider, text])


def disagreements(first: np.ndarray, second: np.ndarray, y: np.ndarray, *, names: tuple[str, str], threshold: float = 0.5) -> pd.DataFrame:
    """Two critics by who flags what, the share of each corner that people called harmful, and where they disagree, who is right."""
    a, b = np.asarray(first) >= threshold, np.asarray(second) >= threshold
    rows = []
    for left in (True, False):
        for right in (True, False):
            corner = (a == left) & (b == right)
            rows.append({names[0]: "harmful" if left else "harmless", names[1]: "harmful" if right else "harmless", "examples": int(corner.sum()),
                         "harmful, people say": f"{100 * np.asarray(y)[corner].mean():.0f} %" if corner.any() else "-",
                         "right": _right(names, left, float(np.asarray(y)[corner].mean())) if corner.any() and left != right else "-"})  # fmt: skip
    return pd.DataFrame(rows)


def _right(names: tuple[str, str], first_flags: bool, harmful: float) -> str:
    """Of two critics that disagree, the one that people side with more often."""
    share = harmful if first_flags else 1 - harmful  # in which the first is right
    return f"{names[0]}, {100 * share:.0f} %" if share > 0.5 else f"{names[1]}, {100 * (1 - share):.0f} %" if share < 0.5 else "neither more often"


def schedule_table(risk: np.ndarray, harmful: np.ndarray, *, batch_size: int = 8, **settings) -> pd.DataFrame:
    """Beta of each example under a :class:`safelab.schedules.RiskSchedule`: columns ``risk``, ``harmful``, ``beta``, ``held``.

    Examples are taken in their order, ``batch_size`` a step; ``held`` is a beta of 0.5 or more.
    """
    import torch

    from safelab.schedules import RiskSchedule

    schedule = RiskSchedule(**settings)
    used = torch.tensor(np.asarray(risk), dtype=torch.float64)
    if schedule.of_step:
        before, steps = None, []
        for step in used.split(batch_size):
            before = schedule.smooth(float(schedule.pool(step)), before)
            steps.append(torch.full((len(step),), before, dtype=torch.float64))
        used = torch.cat(steps)
    beta = schedule(used)[1].numpy()
    return pd.DataFrame({"risk": np.asarray(risk), "harmful": np.asarray(harmful, bool), "beta": beta, "held": beta >= 0.5})


def schedule_designer(risk: np.ndarray, harmful: np.ndarray):
    """Controls for bounds, kind, granularity and smoothing, against real risks: the betas, and which examples are held."""
    import ipywidgets as w

    from safelab.plots import new_figure
    from safelab.schedules import GRANULARITIES, KINDS

    bounds = w.FloatRangeSlider(value=(0.1, 0.9), min=0.0, max=1.0, step=0.05, description="beta bounds", continuous_update=False)
    kind = w.Dropdown(options=KINDS, description="kind")
    granularity = w.Dropdown(options=[g for g in GRANULARITIES if g != "token"], description="granularity")
    threshold = w.FloatSlider(0.5, min=0.0, max=1.0, step=0.05, description="threshold", continuous_update=False)
    smoothing = w.FloatSlider(0.0, min=0.0, max=0.95, step=0.05, description="smoothing", continuous_update=False)
    text, picture = w.HTML(), w.Image(format="png", layout=w.Layout(height="260px", width="620px"))

    def show(_=None) -> None:
        by_step = granularity.value.startswith("batch")
        smoothing.disabled, threshold.disabled = not by_step, kind.value != "threshold"
        table = schedule_table(
            risk, harmful, beta_min=bounds.value[0], beta_max=bounds.value[1], kind=kind.value, threshold=threshold.value,
            granularity=granularity.value, smoothing=smoothing.value if by_step else 0.0,
        )  # fmt: skip
        held = {name: 100 * group["held"].mean() for name, group in table.groupby("harmful")}
        text.value = f"held (beta of 0.5 or more): <b>{held.get(True, 0):.0f} %</b> of the harmful examples, <b>{held.get(False, 0):.0f} %</b> of the harmless"
        figure, (ax,) = new_figure(7, 2.9)
        for flag, marker, colour, name in ((False, "o", "#0072B2", "harmless"), (True, "X", "#D55E00", "harmful")):
            rows = table[table.harmful == flag]
            ax.plot(rows.index, rows.beta, marker, color=colour, ms=4, mec="none", alpha=0.7, label=name)
        ax.set(xlabel="example, in training order", ylabel="beta", ylim=(-0.03, 1.03))
        ax.legend(frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.18))
        picture.value = _png(figure)

    for control in (bounds, kind, granularity, threshold, smoothing):
        control.observe(show, "value")
    show()
    return w.VBox([w.HBox([bounds, kind, granularity]), w.HBox([threshold, smoothing]), text, picture])


def _png(figure) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
