"""Training watched and steered: it runs in a thread of its own, so that the page stays alive."""

from __future__ import annotations

import functools
import html
import threading
import time

_ONE_AT_A_TIME = threading.Lock()  # a run's seeds are those of the whole process
SIGNALS = {"nll": "response NLL (nats)", "kl": "KL to the reference (nats)", "risk": "mean risk", "beta": "mean beta", "asr": "attack success rate"}
ACTIVE = ("waiting", "preparing", "training", "paused", "measuring")


class TrainingRun:
    """One fine-tuning in a background thread, to be started, paused, stopped and waited for. Everything it has seen is kept here, whatever becomes of the page.

    Parameters
    ----------
    name
        What to call it.
    work
        ``work(callbacks, again) -> result``: trains with these trainer callbacks, as :func:`safelab.experiments.fine_tune` and
        :func:`~safelab.experiments.run_cell` do; ``again`` is False the first time.

    Attributes
    ----------
    status
        ``"ready"``, ``"waiting"`` (for another run to end), ``"preparing"``, ``"training"``, ``"paused"``, ``"measuring"`` (the result),
        ``"finished"``, ``"stopped"`` or ``"failed"``.
    step, steps
        Optimiser steps done, and in all (0: not known yet).
    history
        One dict a log: ``step`` with ``nll``, ``kl``, ``risk``, ``beta``, or with what a monitor measured, such as ``asr``.
    result, error
        What ``work`` returned, or the exception that ended it.
    """

    def __init__(self, name: str, work) -> None:
        self.name, self.status, self.step, self.steps = name, "ready", 0, 0
        self.history: list[dict] = []
        self.result, self.error = None, None
        self.listeners: list = []  # each is called with the run when something has changed, in the thread that changed it
        self._work, self._thread, self._began = work, None, False
        self._go, self._stop, self._seconds = threading.Event(), threading.Event(), 0.0

    @property
    def active(self) -> bool:
        """Whether it has been started and has not ended."""
        return self.status in ACTIVE

    def start(self) -> TrainingRun:
        """Begin, or from the beginning again after an end; a run that is under way goes on as it is."""
        if not self.active:
            self.step, self.steps, self.history, self.result, self.error, self._seconds = 0, 0, [], None, None, 0.0
            self._go.set()
            self._stop.clear()
            self._tell("waiting")
            self._thread = threading.Thread(target=self._run, args=(self._began,), name=f"training {self.name}", daemon=True)
            self._began = True
            self._thread.start()
        return self

    def pause(self) -> None:
        """Hold after the step that is being made, until :meth:`resume`."""
        self._go.clear()
        self._changed()

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._go.set()
        self._changed()

    @property
    def pausing(self) -> bool:
        """Whether :meth:`pause` was called, and :meth:`resume` not since."""
        return not self._go.is_set()

    def stop(self) -> None:
        """End after the step that is being made; the result is the model as it is then."""
        self._stop.set()
        self._go.set()
        self._changed()

    @property
    def stopping(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stop.is_set()

    def wait(self, minutes: float):
        """The result, waited for: a run that was not started is.

        Raises
        ------
        TimeoutError
            It has not ended within the time; it goes on.
        RuntimeError
            It was stopped before it had begun.
        Exception
            The one that ended it.
        """
        if self.status == "ready":
            self.start()
        self._thread.join(60 * minutes)
        if self._thread.is_alive():
            raise TimeoutError(f"{self.name!r} is {self.status} at step {self.step} of {self.steps} after {minutes:g} minutes: resume it if it is paused, and wait again")
        if self.error:
            raise self.error
        if self.result is None:
            raise RuntimeError(f"{self.name!r} was stopped before it had begun: start it again")
        return self.result

    def seconds_left(self) -> float | None:
        """Of the training, from the mean step so far; None before the first."""
        return (self.steps - self.step) * self._seconds / self.step if self._seconds else None

    def _tell(self, status: str) -> None:
        self.status = status
        self._changed()

    def _changed(self) -> None:
        for listener in self.listeners:
            listener(self)

    def _run(self, again: bool) -> None:
        try:
            while not _ONE_AT_A_TIME.acquire(timeout=0.2):
                if self.stopping:
                    return self._tell("stopped")
            try:
                self._tell("preparing")
                if not self.stopping:
                    self.result = self._work([_remote(self)], again)
                    if not self.history and isinstance(self.result, dict):  # a stored row
                        self.history = sorted([*self.result.get("history", []), *(self.result.get("measured") or [])], key=lambda h: h["step"])
                        self.step = self.steps = self.history[-1]["step"] if self.history else 0
            finally:
                _ONE_AT_A_TIME.release()
            self._tell("stopped" if self.stopping else "finished")
        except Exception as error:  # shown, and raised where the run is waited for
            self.error = error
            self._tell("failed")


def _remote(run: TrainingRun):
    """The trainer callback between a trainer and ``run``."""
    from transformers import TrainerCallback

    class Remote(TrainerCallback):
        began = 0.0

        def on_train_begin(self, args, state, control, **kwargs) -> None:
            run.steps, self.began = state.max_steps, time.monotonic()
            run._tell("training")

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            seen = {key: logs[key] for key in SIGNALS if key in (logs or {})}
            if seen:
                run.history.append({"step": state.global_step} | seen)
                run._changed()

        def on_step_end(self, args, state, control, **kwargs) -> None:
            run.step = state.global_step
            run._seconds += time.monotonic() - self.began  # with what was measured and drawn since the last step, without pauses
            run._changed()
            if run.pausing and not run.stopping:
                run._tell("paused")
                run._go.wait()
                run._tell("training")
            self.began = time.monotonic()
            if run.stopping:
                control.should_training_stop = True

        def on_train_end(self, args, state, control, **kwargs) -> None:
            run._tell("measuring")

    return Remote()


def run_line(run: TrainingRun) -> str:
    """A run in a line: status, step, last signals, time left."""
    last: dict = {}
    for entry in run.history:
        last |= entry
    wish = ", stopping" if run.stopping and run.active else ", pausing" if run.pausing and run.active and run.status != "paused" else ""
    parts = [f"{run.status}{wish}"]
    if run.steps:
        parts.append(f"step {run.step} of {run.steps}")
    parts += [f"{key.upper() if key != 'beta' and key != 'risk' else key} {last[key]:.2f}" for key in SIGNALS if key in last]
    left = run.seconds_left()
    if run.active and left is not None:
        parts.append(f"about {left:.0f} s left" if left < 120 else f"about {left / 60:.0f} min left")
    if run.error:
        parts.append(f"{type(run.error).__name__}: {run.error}")
    return " \u00b7 ".join(parts)


def plot_runs(runs):
    """The signals of runs by step, one panel a signal and one line a run."""
    from safelab.plots import new_figure, plot_history

    figure, axes = new_figure(10, 5.2, columns=3, rows=2)
    histories = {run.name: list(run.history) for run in runs}
    lines = {}
    for (key, title), ax in zip(SIGNALS.items(), axes):
        plot_history(histories, key, ylabel="", ax=ax, smooth=key != "asr")
        ax.set_title(title, fontsize=10, loc="left")
        if key not in ("nll", "kl"):  # shares
            ax.set_ylim(-0.03, 1.03)
        if ax.get_legend():
            ax.get_legend().remove()
        lines |= {label: line for line, label in zip(*ax.get_legend_handles_labels())}
    for ax in axes[len(SIGNALS) :]:  # the place that is left is the legend's
        ax.set_axis_off()
    if lines:
        axes[-1].legend(list(lines.values()), list(lines), loc="center", frameon=False)
    return figure


@functools.cache  # so a cell that is run again shows the box, and the runs, that are there
def training_dashboard(*runs: TrainingRun):
    """Start, pause and stop for each run, and the signals of all of them on one plot, live.

    The same runs have the same box: shown again, in this page or in another after a closed tab, it rejoins them.
    """
    import ipywidgets as w

    from safelab.widgets.parts import named_box, png

    picture = w.Image(format="png", layout=w.Layout(height="468px", width="900px", object_fit="contain"))
    drawing, drawn = threading.Lock(), {"at": 0.0, "took": 0.0}

    def draw(now: bool) -> None:
        """At most a tenth of the time is spent on drawing."""
        if now or time.monotonic() - drawn["at"] > 10 * drawn["took"]:
            with drawing:
                began = time.monotonic()
                picture.value = png(plot_runs(runs))
                drawn.update(at=time.monotonic(), took=time.monotonic() - began)

    def row(run: TrainingRun):
        start = w.Button(description="Start", tooltip=f"Start {run.name}", button_style="primary", layout=w.Layout(width="90px"))
        pause = w.Button(description="Pause", tooltip=f"Pause or resume {run.name}", layout=w.Layout(width="90px"))
        stop = w.Button(description="Stop", tooltip=f"Stop {run.name} after this step", layout=w.Layout(width="90px"))
        bar = w.FloatProgress(0, min=0, max=1, description=run.name, style={"description_width": "160px"}, layout=w.Layout(width="420px"))
        line = w.HTML()

        def show(run: TrainingRun) -> None:
            start.disabled, pause.disabled, stop.disabled = run.active, not run.active, not run.active or run.stopping
            pause.description = "Resume" if run.pausing and run.active else "Pause"
            bar.value = run.step / run.steps if run.steps else 0.0
            line.value = html.escape(run_line(run))

        def changed(run: TrainingRun) -> None:
            show(run)
            draw(now=not run.active)

        start.on_click(lambda _: run.start())
        pause.on_click(lambda _: run.resume() if run.pausing else run.pause())
        stop.on_click(lambda _: run.stop())
        run.listeners.append(changed)
        show(run)
        return w.VBox([w.HBox([bar, start, pause, stop]), line])

    rows = [row(run) for run in runs]
    draw(now=True)
    return named_box("training-dashboard", [*rows, picture])
