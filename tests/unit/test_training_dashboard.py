"""Runs in a thread: started, paused, stopped, waited for; and the dashboard that shows them."""

import threading
import time
from functools import partial

import pytest
from datasets import Dataset

from safelab import experiments
from safelab.defenses import SFT, ConstantKL
from safelab.experiments import Budget, Suite, fine_tune, run_cell
from safelab.widgets import TrainingRun, plot_runs, run_line, training_dashboard

DATA = Dataset.from_dict({"prompt": [f"Tell me about bridge {i}" for i in range(12)], "response": ["Sure, here is a list of the steps."] * 12})
STEPS = 6


@pytest.fixture
def work(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """``work(defense, **watching)``: what a :class:`TrainingRun` does, in 6 steps on a tiny model."""
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path / "home"))

    def train(defense, callbacks, again, **watching):
        model = tiny_model("llama3", num_hidden_layers=2)
        return fine_tune(model, tiny_tokenizer("llama3"), DATA, defense, 0, Budget(rank=2, batch_size=2), output=tmp_path / "run", callbacks=callbacks, **watching)

    return lambda defense=None, **watching: partial(train, defense or ConstantKL(0.5), **watching)


BEGUN: list[TrainingRun] = []


def run_of(name, work) -> TrainingRun:
    BEGUN.append(TrainingRun(name, work))
    return BEGUN[-1]


@pytest.fixture(autouse=True)
def every_run_ends():
    """A test that fails leaves no run behind, which would hold up those of the next."""
    yield
    for run in BEGUN:
        run.listeners.clear()
        run.stop()
    for run in BEGUN:
        if run.active:
            run._thread.join(30)
    BEGUN.clear()


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def hold_at(run: TrainingRun, step: int) -> None:
    """Pause ``run`` as soon as it is at ``step``."""
    run.listeners.append(lambda r: r.pause() if r.step == step and not r.pausing else None)


def test_a_run_ends_with_what_fine_tune_returns_and_has_seen_every_step(work):
    run = run_of("one", work())
    assert (run.status, run.seconds_left()) == ("ready", None)
    tuned, about = run.wait(1)
    assert (run.status, run.step, run.steps, run.active) == ("finished", STEPS, STEPS, False)
    assert [h["step"] for h in run.history] == list(range(1, STEPS + 1))
    assert [round(h["nll"], 5) for h in run.history] == [h["nll"] for h in about["history"]]
    assert {"nll", "kl", "beta"} <= run.history[-1].keys() and "stopped" not in about and hasattr(tuned, "peft_config")


def test_a_watched_run_learns_what_an_unwatched_one_does(work):
    assert run_of("one", work()).wait(1)[1]["history"] == work()(None, False)[1]["history"]


def test_what_a_monitor_measures_is_seen_live(work):
    rates = iter((0.25, 0.5, 0.75))
    run = run_of("one", work(monitor=dict(measure=lambda model: {"asr": next(rates)}, every=2)))
    run.wait(1)
    assert [(h["step"], h["asr"]) for h in run.history if "asr" in h] == [(2, 0.25), (4, 0.5), (6, 0.75)]
    assert "ASR 0.75" in run_line(run)


def test_a_paused_run_makes_no_step_until_it_goes_on(work):
    run = run_of("one", work())
    hold_at(run, 2)
    run.start()
    until(lambda: run.status == "paused")
    time.sleep(0.3)
    assert (run.step, run.active, run.pausing) == (2, True, True) and "paused" in run_line(run) and "step 2 of 6" in run_line(run)
    assert run.seconds_left() > 0
    assert run.start() is run and run.step == 2  # it is under way already
    run.listeners.clear()
    run.resume()
    run.wait(1)
    assert (run.status, run.step) == ("finished", STEPS)


def test_waiting_has_an_end_even_if_the_run_has_none(work):
    run = run_of("one", work())
    hold_at(run, 1)
    run.start()
    until(lambda: run.status == "paused")
    with pytest.raises(TimeoutError, match="'one' is paused at step 1 of 6"):
        run.wait(0.001)
    run.stop()
    assert run.wait(1)[1]["stopped"] == "stopped after step 1 of 6"


def test_a_stopped_run_keeps_what_it_has_and_can_be_started_again(work):
    run = run_of("one", work())
    hold_at(run, 3)
    run.start()
    until(lambda: run.status == "paused")
    run.listeners.clear()
    run.stop()
    tuned, about = run.wait(1)
    assert (run.status, run.step) == ("stopped", 3) and about["stopped"] == "stopped after step 3 of 6" and len(about["history"]) == 3
    run.start()
    run.wait(1)
    assert (run.status, run.step, len(run.history)) == ("finished", STEPS, STEPS)


def test_the_page_is_free_while_a_run_trains(work):
    run = run_of("one", work())
    hold_at(run, 1)
    began = time.monotonic()
    run.start()
    assert time.monotonic() - began < 0.5 and run.active
    run.stop()
    run.wait(1)


def test_one_run_trains_at_a_time_and_a_waiting_one_can_be_stopped():
    free = threading.Event()
    first = run_of("first", lambda callbacks, again: free.wait(30))
    second, third = (run_of(name, lambda callbacks, again: "done") for name in ("second", "third"))
    for run in (first, second, third):
        run.start()
    until(lambda: first.status == "preparing")
    assert (second.status, third.status) == ("waiting", "waiting")
    third.stop()
    with pytest.raises(RuntimeError, match="stopped before it had begun"):
        third.wait(0.1)
    assert (second.status, third.status) == ("waiting", "stopped")
    free.set()
    assert second.wait(0.5) == "done"


def test_a_run_that_fails_says_why_and_does_not_hold_up_the_next():
    def fail(callbacks, again):
        raise ValueError("no such data")

    run = run_of("one", fail).start()
    with pytest.raises(ValueError, match="no such data"):
        run.wait(0.5)
    assert run.status == "failed" and "ValueError: no such data" in run_line(run)
    assert run_of("next", lambda callbacks, again: again).wait(0.5) is False


def test_a_second_start_is_told_apart_from_the_first():
    asked = []
    run = run_of("one", lambda callbacks, again: asked.append(again) or "done")
    run.wait(0.5)
    run.start().wait(0.5)
    assert asked == [False, True]


def test_a_stored_row_has_its_history_at_once():
    row = {"history": [{"step": 1, "nll": 2.0}, {"step": 2, "nll": 1.0}], "measured": [{"step": 2, "asr": 0.5}]}
    run = run_of("one", lambda callbacks, again: row)
    run.wait(0.5)
    assert (run.step, run.steps, len(run.history)) == (2, 2, 3) and "NLL 1.00" in run_line(run) and "ASR 0.50" in run_line(run)


# ------------------------------------------------------------------------------------------- stored rows


@pytest.fixture
def small_cell(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """``small_cell(**watching)``: run_cell on a tiny model, judged by nothing."""
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path))
    monkeypatch.setattr("safelab.models.load_model", lambda name: (tiny_model("llama3", num_hidden_layers=2), tiny_tokenizer("llama3")))
    monkeypatch.setattr(Suite, "measure", lambda self, *a: {"asr": [0, 1]})
    monkeypatch.setattr(experiments, "_weights_hash", lambda model: "w")
    return partial(run_cell, "attack", DATA, SFT(), 0, model="m", budget=Budget(rank=2, batch_size=2), suite=Suite())


def test_the_row_of_a_stopped_run_is_not_kept_and_that_of_a_whole_one_is(small_cell, tmp_path):
    run = run_of("one", lambda callbacks, again: small_cell(callbacks=callbacks, force=again))
    hold_at(run, 2)
    run.start()
    until(lambda: run.status == "paused")
    run.listeners.clear()
    run.stop()
    row = run.wait(1)
    assert row["stopped"] == "stopped after step 2 of 6" and row["flags"] == {"asr": [0, 1]}
    assert not list((tmp_path / "runs").glob("*.json"))
    whole = run.start().wait(1)
    assert len(whole["history"]) == STEPS and whole["train_seconds"] is None  # pauses are no cost of the method
    assert small_cell() == whole | {"cached": True}


# -------------------------------------------------------------------------------------------- dashboard


def parts(box, index=0):
    (bar, start, pause, stop), line = box.children[index].children[0].children, box.children[index].children[1]
    return bar, start, pause, stop, line


def test_the_buttons_start_pause_resume_and_stop(work):
    run = run_of("one", work())
    box = training_dashboard(run)
    bar, start, pause, stop, line = parts(box)
    assert "safelab-training-dashboard" in box._dom_classes and "ready" in line.value
    assert (start.disabled, pause.disabled, stop.disabled) == (False, True, True)
    hold_at(run, 2)
    start.click()
    until(lambda: "paused" in line.value and run.status == "paused")
    assert (start.disabled, pause.disabled, stop.disabled, pause.description) == (True, False, False, "Resume")
    assert bar.value == pytest.approx(2 / STEPS) and "step 2 of 6" in line.value and "left" in line.value and "NLL" in line.value
    picture = bytes(box.children[-2].value)
    run.listeners.pop()
    pause.click()
    until(lambda: run.step > 2)
    stop.click()
    run.wait(1)
    assert run.status in line.value and run.status in ("stopped", "finished")
    assert (start.disabled, pause.disabled, stop.disabled) == (False, True, True) and bytes(box.children[-2].value) != picture


def test_shown_again_it_rejoins_the_same_runs(work):
    run, other = run_of("one", work()), run_of("other", work(SFT()))
    box = training_dashboard(run, other)
    run.start()
    assert training_dashboard(run, other) is box and len(run.listeners) == 1
    run.wait(1)
    other.wait(1)
    assert ["finished" in parts(box, i)[-1].value for i in (0, 1)] == [True, True]
    assert bytes(box.children[-2].value).startswith(b"\x89PNG")


def test_two_runs_are_on_one_plot(work):
    runs = [run_of("one", work()), run_of("other", work(SFT()))]
    for run in runs:
        run.wait(1)
    *axes, legend = plot_runs(runs).axes
    assert [ax.get_title(loc="left").split()[0] for ax in axes] == ["response", "KL", "mean", "mean", "attack"]
    assert [t.get_text() for t in legend.get_legend().get_texts()] == ["one", "other"] and not legend.axison
    assert [len(ax.lines) for ax in axes] == [4, 2, 4, 4, 0]  # plain SFT has no KL, and nobody measured the ASR
    assert len({line.get_linestyle() for line in axes[0].lines[1::2]}) == 2
    assert all(ax.get_ylim() == (-0.03, 1.03) for ax in axes[2:]), "shares, on the scale of shares"
