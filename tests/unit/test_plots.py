"""What figures show is what they were given; a figure on disk comes with its numbers and its alternative text."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from safelab.experiments import DEMO_ARMS
from safelab.plots import (
    ARM_STYLE,
    GROUP_STYLE,
    SERIES_STYLE,
    new_figure,
    plot_calibration,
    plot_curves,
    plot_demo,
    plot_drift,
    plot_history,
    plot_intervals,
    plot_points,
    plot_rates,
    plot_risks,
    save_figure,
)

RATES = ("asr", "asr_strongreject", "over_refusal", "utility")


def _rows() -> list[dict]:
    """One row an arm; each rate differs from all others."""
    rows = []
    for a, arm in enumerate(DEMO_ARMS):
        row: dict = {"arm": arm}
        for k, key in enumerate(RATES):
            mean = 0.05 + 0.2 * a + 0.03 * k
            row[key] = {"mean": mean, "lo": mean - 0.04, "hi": mean + 0.05, "n": 100 + k}
        rows.append(row)
    return rows


@pytest.fixture
def demo() -> dict:
    return {"arms": _rows(), "seeds": [0], "attack": "a task with 10 % harmful of 240", "model": "tiny"}


def _draw(figure: Figure) -> None:
    """Render it; a missing glyph or a layout that does not fit is a warning, here an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()


def _intervals(ax: Axes) -> list[tuple]:
    """(y, lo, mean, hi) as drawn, from the lines and markers on the axes."""
    lines = [line.get_xydata() for line in ax.lines]
    spans, dots = [xy for xy in lines if len(xy) == 2], [xy for xy in lines if len(xy) == 1]
    return [(dot[0, 1], span[0, 0], dot[0, 0], span[1, 0]) for span, dot in zip(spans, dots, strict=True)]


# ----------------------------------------------------------------------------------------------- rates


def test_rates_are_drawn_in_percent_with_their_intervals():
    figure, (ax,) = new_figure()
    assert plot_rates(_rows(), "over_refusal", title="Refused", ax=ax) is ax
    expected = [(y, *(100 * row["over_refusal"][k] for k in ("lo", "mean", "hi"))) for y, row in enumerate(_rows())]
    np.testing.assert_allclose(_intervals(ax), expected)
    assert ax.get_xlabel() == "% of 102 cases, 95 % interval"
    assert ax.get_title(loc="left") == "Refused"
    assert [t.get_text() for t in ax.get_yticklabels()] == [ARM_STYLE[arm][2] for arm in DEMO_ARMS]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first arm on top
    _draw(figure)


def test_each_rate_carries_its_number_and_its_arms_colour():
    _, (ax,) = new_figure()
    plot_rates(_rows(), "asr", title="", ax=ax)
    assert [text.get_text() for text in ax.texts] == [f"{100 * row['asr']['mean']:.0f}" for row in _rows()]
    assert [text.get_color() for text in ax.texts] == [ARM_STYLE[arm][0] for arm in DEMO_ARMS]


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_rates_of_0_and_100_percent_lie_inside_the_axes(mean):
    figure, (ax,) = new_figure()
    plot_rates([{"arm": "sft", "asr": {"mean": mean, "lo": max(0, mean - 0.1), "hi": min(1, mean + 0.1), "n": 9}}], "asr", title="", ax=ax)
    left, right = ax.get_xlim()
    assert left < 100 * mean < right
    _draw(figure)


def test_arms_can_be_told_apart_without_colour():
    assert len({marker for _, marker, _ in ARM_STYLE.values()}) == len({name for *_, name in ARM_STYLE.values()}) == len(ARM_STYLE)
    assert all(colors.is_color_like(colour) for colour, *_ in ARM_STYLE.values())
    assert set(DEMO_ARMS) <= set(ARM_STYLE)


# ------------------------------------------------------------------------------------------------ demo


def test_the_demo_has_one_labelled_panel_a_rate(demo):
    figure = plot_demo(demo)
    assert len(figure.axes) == len(RATES)
    for ax, key in zip(figure.axes, RATES, strict=True):
        np.testing.assert_allclose([100 * row[key]["mean"] for row in demo["arms"]], [mean for _, _, mean, _ in _intervals(ax)])
        assert ax.get_xlabel() and ax.get_title(loc="left")
    assert len({ax.get_title(loc="left") for ax in figure.axes}) == len(RATES)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [ARM_STYLE[arm][2] for arm in DEMO_ARMS]
    assert not any(t.get_text() for ax in figure.axes[1:] for t in ax.get_yticklabels())
    _draw(figure)


@pytest.mark.parametrize("seeds, text", [([0], "seed 0"), ([0, 3], "seeds 0, 3")])
def test_the_demo_says_what_was_run(demo, seeds, text):
    title = plot_demo(demo | {"seeds": seeds}).get_suptitle()
    assert title == f"Fine-tuned on {demo['attack']} examples; tiny, {text}"


# --------------------------------------------------------------------------------------------- history


def _history(values, key="kl") -> list[dict]:
    return [{"step": step, key: value} for step, value in enumerate(values, 1)]


@pytest.mark.parametrize("n", [1, 2, 4, 5, 30])
def test_a_history_is_smoothed_over_five_steps_by_a_plain_mean(n):
    values = np.random.default_rng(0).random(n)
    figure, (ax,) = new_figure()
    assert plot_history({"sft": _history(values)}, "kl", ylabel="KL (nats)", ax=ax) is ax
    raw, smooth = ax.lines
    np.testing.assert_allclose(raw.get_xydata(), np.c_[np.arange(1, n + 1), values])
    at = [[values[min(max(i + d, 0), n - 1)] for d in (-2, -1, 0, 1, 2)] for i in range(n)]  # the ends repeat
    np.testing.assert_allclose(smooth.get_xydata(), np.c_[np.arange(1, n + 1), np.mean(at, axis=1)])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimiser step", "KL (nats)")
    _draw(figure)


def test_an_arm_without_the_signal_is_left_out():
    """Plain SFT logs no KL."""
    _, (ax,) = new_figure()
    plot_history({"sft": _history([1, 2], "nll"), "constant-kl": _history([1, 2])}, "kl", ylabel="KL", ax=ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [ARM_STYLE["constant-kl"][2]]


def test_steps_without_the_signal_are_left_out():
    _, (ax,) = new_figure()
    plot_history({"sft": [*_history([3.0]), {"step": 2}, {"step": 5, "kl": 4.0}]}, "kl", ylabel="KL", ax=ax)
    assert ax.lines[0].get_xydata().tolist() == [[1, 3], [5, 4]]


# ----------------------------------------------------------------------------------------------- risks


def test_every_risk_is_counted_in_the_bars_of_its_class():
    risks = np.r_[0.0, 1.0, np.random.default_rng(0).random(98)]
    harmful = (np.arange(100) % 5 == 0).astype(int)
    figure, (ax,) = new_figure()
    assert plot_risks(risks, harmful, ax=ax) is ax
    benign_bars, harmful_bars = ([bar.get_height() for bar in bars] for bars in ax.containers)
    assert benign_bars == [((risks >= i / 20) & (risks < i / 20 + 0.05 + (i == 19)) & (harmful == 0)).sum() for i in range(20)]
    assert sum(benign_bars) == 80 and sum(harmful_bars) == 20
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["benign (n=80)", "harmful (n=20)"]
    assert ax.get_xlabel() and ax.get_ylabel()
    _draw(figure)


def test_risks_of_one_class_alone_are_drawn():
    figure, (ax,) = new_figure()
    plot_risks([0.1, 0.2], [0, 0], ax=ax)
    assert "harmful (n=0)" in [text.get_text() for text in ax.get_legend().get_texts()]
    _draw(figure)


# ---------------------------------------------------------------------------------------------- probes


def _figure_of(mean: float, n: int = 50) -> dict:
    return {"mean": mean, "lo": mean - 0.1, "hi": mean + 0.05, "n": n}


@pytest.mark.parametrize("places", [[1, 5, 30], ["50%", "100%", "\n"]])
def test_curves_show_means_bands_and_counts(places):
    rows = [{"x": p} for p in places]
    curves = {"twins": [_figure_of(v) for v in (0.5, 0.7, 0.9)], "other": [_figure_of(v, 9) for v in (0.6, 0.6, 0.6)]}
    figure, (ax,) = new_figure()
    assert plot_curves(rows, "x", curves, xlabel="layer", ylabel="AUROC", chance=0.5, ax=ax) is ax
    at = places if isinstance(places[0], int) else [0, 1, 2]
    np.testing.assert_allclose(ax.lines[0].get_xydata(), np.c_[at, [0.5, 0.7, 0.9]])
    low, high = (f(ax.collections[0].get_paths()[0].vertices[:, 1]) for f in (np.min, np.max))
    assert (low, high) == pytest.approx((0.4, 0.95))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["twins (n=50)", "other (n=9)"]
    if isinstance(places[0], str):
        assert [t.get_text() for t in ax.get_xticklabels()] == ["50%", "100%", "\\n"]
    _draw(figure)


def test_intervals_are_drawn_side_by_side_from_top_to_bottom():
    rows = [{"test": "a", "probe": _figure_of(0.9), "text": _figure_of(0.5)}, {"test": "b", "probe": _figure_of(0.8), "text": _figure_of(0.4)}]
    figure, (ax,) = new_figure()
    assert plot_intervals(rows, "test", {"probe": "probe", "text": "words"}, xlabel="AUROC", ax=ax) is ax
    probe, text = (line.get_xydata() for line in ax.lines)
    assert probe[:, 0].tolist() == [0.9, 0.8] and text[:, 0].tolist() == [0.5, 0.4] and (probe[:, 1] < text[:, 1]).all()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"] and ax.get_ylim()[0] > ax.get_ylim()[1]
    _draw(figure)


def test_calibration_shows_share_by_probability_with_counts():
    figure, (ax,) = new_figure()
    assert plot_calibration([0, 0, 0, 1, 1], [0.05, 0.05, 0.05, 0.05, 1.0], ax=ax) is ax
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0.05, 0.25], [1.0, 1.0]])
    assert [t.get_text() for t in ax.texts] == ["4", "1"]
    _draw(figure)


def test_points_are_drawn_by_group():
    xy, groups = np.arange(12.0).reshape(6, 2), ["harmful", "twins", "unheard of"] * 2
    figure, (ax,) = new_figure()
    assert plot_points(xy, groups, title="PCA", ax=ax) is ax
    assert [c.get_offsets().data.tolist() for c in ax.collections] == [xy[k::3].tolist() for k in range(3)]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["harmful (n=2)", "twins (n=2)", "unheard of (n=2)"]
    _draw(figure)


def test_drift_is_drawn_by_layer_one_line_a_group():
    rows = [{"layer": layer, "group": g, "distance": layer * k} for layer in (1, 2) for k, g in enumerate(["harmful", "twins"], 1)]
    figure, (ax,) = new_figure()
    plot_drift(rows, "distance", ylabel="moved", ax=ax)
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[1, 1], [2, 2]], [[1, 2], [2, 4]]]
    _draw(figure)


def test_series_and_groups_can_be_told_apart_without_colour():
    assert len({marker for _, marker, _ in SERIES_STYLE}) == len({str(line) for *_, line in SERIES_STYLE}) == len(SERIES_STYLE)
    assert len({marker for _, marker in GROUP_STYLE.values()}) == len(GROUP_STYLE)


# --------------------------------------------------------------------------------------------- on disk

def test_a_notebook_shows_a_figure_without_pyplot():
    png = new_figure()[0]._repr_png_()
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG" and min(image.size) > 200


ALT = 'Four panels; "adaptive" keeps 5 %, naïve tuning 80 %.'


@pytest.fixture
def figure(demo):
    return plot_demo(demo)


def test_a_figure_is_written_with_its_numbers_and_alternative_text(figure, tmp_path, demo):
    save_figure(figure, tmp_path / "new" / "demo.png", demo, ALT)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["demo.json", "demo.png"]
    with Image.open(tmp_path / "new" / "demo.png") as image:
        image.load()
        assert image.format == "PNG" and image.text["Description"] == ALT
        assert min(image.size) > 300 and len(image.convert("L").getcolors()) > 10  # something is drawn
    assert json.loads((tmp_path / "new" / "demo.json").read_text(encoding="utf-8")) == {"alt": ALT} | demo


def _half_written(temp, **kwargs):
    temp.write_bytes(b"\x89PNG half")
    raise OSError("disk full")


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("what", ["savefig", "numbers"])
def test_a_failure_leaves_nothing_half_written_and_an_older_figure_as_it_was(figure, tmp_path, demo, monkeypatch, what, older):
    path = tmp_path / "demo.png"
    if older:
        save_figure(new_figure()[0], path, {"old": 1}, "older")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    if what == "savefig":
        monkeypatch.setattr(figure, "savefig", _half_written)
    with pytest.raises((OSError, TypeError), match="disk full|not JSON serializable"):
        save_figure(figure, path, demo | ({"numbers": object()} if what == "numbers" else {}), ALT)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
