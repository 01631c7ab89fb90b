"""risk -> (alpha, beta): the values of the formula worked out by hand, its invariants, and what is refused."""

import math

import pytest
import torch

from safelab.schedules import RiskSchedule

RISKS = [0.0, 0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((0.1, 0.9), [0.1, 0.3, 0.5, 0.9]),
        ((0.0, 1.0), [0.0, 0.25, 0.5, 1.0]),
        ((0.2, 0.6), [0.2, 0.3, 0.4, 0.6]),
        ((0.0, 0.0), [0.0] * 4),
        ((1.0, 1.0), [1.0] * 4),
        ((0.5, 0.5), [0.5] * 4),
    ],
)
def test_beta_grows_with_risk_between_its_bounds_and_alpha_is_the_rest(bounds, expected):
    alpha, beta = RiskSchedule(*bounds)(torch.tensor(RISKS))
    assert beta.tolist() == pytest.approx(expected, abs=1e-6)
    assert alpha.tolist() == pytest.approx([1 - b for b in expected], abs=1e-6)


def test_the_default_bounds_are_the_papers():
    _, beta = RiskSchedule()(torch.tensor([0.0, 1.0]))
    assert beta.tolist() == pytest.approx([0.1, 0.9])


def test_example_granularity_looks_at_no_other_example():
    schedule = RiskSchedule()
    alone = [schedule(torch.tensor([r]))[1].item() for r in RISKS]
    assert schedule(torch.tensor(RISKS))[1].tolist() == alone


@pytest.mark.parametrize(
    ("settings", "betas"),
    [
        (dict(kind="clamp"), [0.1, 0.1, 1 / 3, 0.9]),  # scores 1, 2, 3, 5 of the judge
        (dict(kind="clamp", beta_min=0.0, beta_max=1.0), [0.0, 0.0, 1 / 3, 1.0]),
        (dict(kind="threshold"), [0.1, 0.1, 0.9, 0.9]),
        (dict(kind="threshold", threshold=0.51), [0.1, 0.1, 0.1, 0.9]),
    ],
)
def test_other_kinds_at_their_corners(settings, betas):
    alpha, beta = RiskSchedule(**settings)(torch.tensor(RISKS))
    assert beta.tolist() == pytest.approx(betas)
    assert alpha.tolist() == pytest.approx([1 - b for b in betas])


@pytest.mark.parametrize(("granularity", "beta"), [("batch", 0.2), ("batch-max", 0.9)])
def test_one_harmful_example_among_seven_harmless_ones(granularity, beta):
    """By the mean risk of a batch all share 0.1 + 0.8 / 8 and the harmful one is hardly held; by the highest all are."""
    schedule = RiskSchedule(granularity=granularity)
    assert schedule(schedule.pool(torch.tensor([1.0] + [0.0] * 7)))[1].item() == pytest.approx(beta)


def test_smoothing_begins_with_the_first_risk_and_forgets_geometrically():
    schedule, risk = RiskSchedule(granularity="batch", smoothing=0.75), None
    seen = [risk := schedule.smooth(new, risk) for new in (1.0, 0.0, 0.0, 1.0)]
    assert seen == pytest.approx([1.0, 0.75, 0.5625, 0.75 * 0.5625 + 0.25])
    assert RiskSchedule(granularity="batch").smooth(0.3, 0.9) == 0.3


@pytest.mark.parametrize("kind", ["linear", "clamp", "threshold"])
@pytest.mark.parametrize("risk", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_a_risk_that_is_none_is_refused(risk, kind):
    """Also where beta does not depend on it."""
    for bounds in ((0.1, 0.9), (0.5, 0.5)):
        with pytest.raises(ValueError, match=r"risk outside \[0, 1\]"):
            RiskSchedule(*bounds, kind)(torch.tensor([0.5, risk, 0.5]))


@pytest.mark.parametrize("bounds", [(-0.1, 0.5), (0.5, 1.1), (0.6, 0.5), (math.nan, 0.5), (0.1, math.nan)])
def test_bad_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="beta_min <= beta_max"):
        RiskSchedule(*bounds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(granularity="sentence"), "'sentence'.*example, token, batch"),
        (dict(kind="cubic"), "'cubic'.*linear, clamp, threshold"),
        (dict(kind="threshold", threshold=1.5), "threshold 1.5"),
        (dict(granularity="batch", smoothing=1.0), "smoothing 1.0"),
        (dict(smoothing=0.5), "runs over steps"),
        (dict(granularity="token", smoothing=0.5), "runs over steps"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RiskSchedule(**settings)


@pytest.mark.parametrize(("bounds", "needed"), [((0.0, 0.0), False), ((0.0, 0.5), True), ((0.1, 0.1), True)])
def test_a_reference_is_needed_unless_beta_is_always_zero(bounds, needed):
    assert RiskSchedule(*bounds).needs_reference is needed
