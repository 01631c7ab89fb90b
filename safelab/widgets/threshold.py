"""A threshold moved by hand, and two critics side by side."""

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

    from safelab.widgets.parts import named_box

    slider = w.FloatSlider(0.5, min=0.0, max=1.0, step=0.01, description="threshold", continuous_update=False, readout_format=".2f")
    text = w.HTML()

    def show(_=None) -> None:
        figures = threshold_figures(y, risk, slider.value)
        precision = f"{100 * figures['precision']:.1f} %" if figures["flagged"] else "undefined"
        text.value = (
            f"<b>recall {100 * figures['recall']:.1f} %</b> of {int(np.sum(y))} harmful · "
            f"<b>precision {precision}</b> · {100 * figures['flagged']:.1f} % of {len(y)} flagged"
        )

    slider.observe(show, "value")
    show()
    return named_box("threshold", [slider, text])


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
