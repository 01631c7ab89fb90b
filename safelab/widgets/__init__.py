"""Controls for notebooks, one idea a file: ipywidgets fronts, and beside each the plain function that it calls."""

from safelab.widgets.layers import layer_explorer, layer_view
from safelab.widgets.prompt import layer_probes, prompt_box, prompt_report, prompt_risk
from safelab.widgets.schedule import schedule_designer, schedule_table
from safelab.widgets.threshold import disagreements, threshold_explorer, threshold_figures
from safelab.widgets.trade_off import stored_results, trade_off, trade_off_explorer
from safelab.widgets.training import TrainingRun, plot_runs, run_line, training_dashboard

__all__ = [
    "TrainingRun", "disagreements", "layer_explorer", "layer_probes", "layer_view", "plot_runs", "prompt_box", "prompt_report", "prompt_risk", "run_line",
    "schedule_designer", "schedule_table", "stored_results", "threshold_explorer", "threshold_figures", "trade_off", "trade_off_explorer", "training_dashboard",
]  # fmt: skip
