"""Controls for notebooks, one idea a file: ipywidgets fronts, and beside each the plain function that it calls."""

from safelab.widgets.schedule import schedule_designer, schedule_table
from safelab.widgets.threshold import disagreements, threshold_explorer, threshold_figures

__all__ = ["disagreements", "schedule_designer", "schedule_table", "threshold_explorer", "threshold_figures"]
