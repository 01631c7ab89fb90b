"""A schedule designed against the real risks of a data set."""

from __future__ import annotations

import numpy as np
import pandas as pd


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
    from safelab.widgets.parts import named_box, png

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
        picture.value = png(figure)

    for control in (bounds, kind, granularity, threshold, smoothing):
        control.observe(show, "value")
    show()
    return named_box("schedule-designer", [w.HBox([bounds, kind, granularity]), w.HBox([threshold, smoothing]), text, picture])
