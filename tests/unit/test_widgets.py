"""The plain functions behind the controls, and the controls themselves, moved without a browser."""

import numpy as np
import pytest

from safelab.widgets import disagreements, schedule_designer, schedule_table, threshold_explorer, threshold_figures

Y = np.array([1, 1, 1, 0, 0])
RISK = np.array([0.9, 0.6, 0.2, 0.7, 0.1])


@pytest.mark.parametrize(
    ("threshold", "recall", "precision", "flagged"), [(0.0, 1, 0.6, 1), (0.6, 2 / 3, 2 / 3, 0.6), (0.65, 1 / 3, 0.5, 0.4), (0.95, 0, None, 0)]
)
def test_threshold_figures(threshold, recall, precision, flagged):
    found = threshold_figures(Y, RISK, threshold)
    assert (found["recall"], found["flagged"]) == pytest.approx((recall, flagged))
    assert np.isnan(found["precision"]) if precision is None else found["precision"] == pytest.approx(precision)


def test_disagreements_count_each_corner_once():
    table = disagreements(RISK, 1 - RISK, Y, names=("one", "other"))
    assert table["examples"].tolist() == [0, 3, 2, 0]
    assert table["harmful, people say"].tolist() == ["-", "67 %", "50 %", "-"]
    assert table["right"].tolist() == ["-", "one, 67 %", "neither more often", "-"]
    swapped = disagreements(1 - RISK, RISK, Y, names=("other", "one"))
    assert swapped["right"].tolist() == ["-", "neither more often", "one, 67 %", "-"]


def test_betas_by_example_and_by_batch():
    by_example = schedule_table(RISK, Y, beta_min=0.1, beta_max=0.9)
    assert by_example["beta"].tolist() == pytest.approx([0.1 + 0.8 * r for r in RISK])
    assert by_example["held"].tolist() == [True, True, False, True, False]
    by_batch = schedule_table(RISK, Y, beta_min=0.0, beta_max=1.0, granularity="batch", batch_size=3)
    assert by_batch["beta"].tolist() == pytest.approx([1.7 / 3] * 3 + [0.4] * 2)
    smooth = schedule_table(RISK, Y, beta_min=0.0, beta_max=1.0, granularity="batch", batch_size=3, smoothing=0.5)
    assert smooth["beta"].tolist()[-1] == pytest.approx(0.5 * 1.7 / 3 + 0.5 * 0.4)


def test_moving_the_threshold_changes_the_text():
    box = threshold_explorer(Y, RISK)
    slider, text = box.children
    before = text.value
    slider.value = 0.95
    assert text.value != before and "recall 0.0 %" in text.value


def test_the_schedule_designer_shows_what_is_held():
    box = schedule_designer(RISK, Y)
    bounds, kind, granularity = box.children[0].children
    text, picture = box.children[2], box.children[3]
    assert "67 %</b> of the harmful" in text.value and bytes(picture.value).startswith(b"\x89PNG")
    before = bytes(picture.value)
    granularity.value = "batch"
    assert "100 %</b> of the harmful" in text.value and bytes(picture.value) != before  # the mean risk is 0.5
    bounds.value = (0.0, 0.3)
    assert "<b>0 %</b> of the harmful" in text.value
    kind.value = "threshold"
    assert not box.children[1].children[0].disabled
