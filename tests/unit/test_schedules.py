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


@pytest.mark.parametrize(("granularity", "betas"), [("example", [0.9] + [0.1] * 7), ("batch", [0.2] * 8)])
def test_one_harmful_example_among_seven_harmless_ones(granularity, betas):
    """By example it is held at beta_max; by batch all share 0.1 + 0.8 / 8 and it is hardly held."""
    alpha, beta = RiskSchedule(0.1, 0.9, granularity)(torch.tensor([1.0] + [0.0] * 7))
    assert beta.tolist() == pytest.approx(betas)
    assert alpha.tolist() == pytest.approx([1 - b for b in betas])


@pytest.mark.parametrize("granularity", ["example", "batch"])
@pytest.mark.parametrize("risk", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_a_risk_that_is_none_is_refused(risk, granularity):
    """Also where the mean over the batch would lie in [0, 1], or beta does not depend on it."""
    for bounds in ((0.1, 0.9), (0.5, 0.5)):
        with pytest.raises(ValueError, match=r"risk outside \[0, 1\]"):
            RiskSchedule(*bounds, granularity)(torch.tensor([0.5, risk, 0.5]))


@pytest.mark.parametrize("bounds", [(-0.1, 0.5), (0.5, 1.1), (0.6, 0.5), (math.nan, 0.5), (0.1, math.nan)])
def test_bad_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="beta_min <= beta_max"):
        RiskSchedule(*bounds)


def test_an_unknown_granularity_is_refused():
    with pytest.raises(ValueError, match="'token'.*example, batch"):
        RiskSchedule(granularity="token")


@pytest.mark.parametrize(("bounds", "needed"), [((0.0, 0.0), False), ((0.0, 0.5), True), ((0.1, 0.1), True)])
def test_a_reference_is_needed_unless_beta_is_always_zero(bounds, needed):
    assert RiskSchedule(*bounds).needs_reference is needed
