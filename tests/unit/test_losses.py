"""The objective's two terms against plain Python loops in double precision, and their gradients against the closed form."""

import math

import pytest
import torch

from safelab.losses import token_kl, token_nll


def logits(n=6, vocabulary=11, scale=3.0, seed=0, dtype=torch.float64):
    return (scale * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def log_probabilities(row):
    """Log-softmax of one row of numbers, nothing but Python floats."""
    top = max(row)
    norm = top + math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - norm for x in row]


def plain_nll(rows, targets):
    return [-log_probabilities(row)[target] for row, target in zip(rows.double().tolist(), targets.tolist(), strict=True)]


def plain_kl(reference, tuned):
    values = []
    for p_row, q_row in zip(reference.double().tolist(), tuned.double().tolist(), strict=True):
        p, q = log_probabilities(p_row), log_probabilities(q_row)
        values.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    return values


# a square case: there a sum over the wrong axis has the right shape
SHAPES = [(6, 11), (7, 7), (1, 5), (3, 360)]


@pytest.mark.parametrize("scale", [0.01, 3.0, 60.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_nll_is_that_of_a_plain_loop(shape, scale):
    values = logits(*shape, scale=scale)
    targets = torch.arange(shape[0]) * 5 % shape[1]
    assert token_nll(values, targets).tolist() == pytest.approx(plain_nll(values, targets), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("scale", [0.01, 3.0, 60.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_is_that_of_a_plain_loop(shape, scale):
    reference, tuned = logits(*shape, scale=scale), logits(*shape, scale=scale, seed=1)
    assert token_kl(reference, tuned).tolist() == pytest.approx(plain_kl(reference, tuned), rel=1e-11, abs=1e-14)


def test_kl_is_forward_the_expectation_is_under_the_reference():
    """The safe model is sure, the tuned one is not: log(n) nats forward; backward it would be the far larger value."""
    sure, flat = torch.tensor([[30.0, 0.0, 0.0, 0.0]]), torch.zeros(1, 4)
    forward, reverse = token_kl(sure, flat).item(), token_kl(flat, sure).item()
    assert forward == pytest.approx(math.log(4), abs=1e-6)
    assert reverse == pytest.approx(-math.log(4) + 0.75 * 30, abs=1e-4)


def test_kl_is_zero_for_equal_logits_and_positive_otherwise():
    reference = logits(50)
    assert token_kl(reference, reference).abs().max() == 0
    assert token_kl(reference, reference + 7.5).abs().max() < 1e-13  # a shift changes no probability
    assert (token_kl(reference, logits(50, seed=1)) > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_are_summed_in_float32(dtype):
    """Exact to float32 for the values given: a log-sum-exp in half precision would be off in the third digit."""
    reference, tuned = logits(5, 2000, dtype=dtype), logits(5, 2000, seed=1, dtype=dtype)
    targets = torch.arange(5)
    nll, kl = token_nll(tuned, targets), token_kl(reference, tuned)
    assert nll.dtype == kl.dtype == torch.float32
    assert nll.tolist() == pytest.approx(plain_nll(tuned, targets), rel=1e-5)
    assert kl.tolist() == pytest.approx(plain_kl(reference, tuned), rel=1e-5)


def test_float64_is_kept():
    assert token_nll(logits(), torch.zeros(6, dtype=torch.long)).dtype == token_kl(logits(), logits()).dtype == torch.float64


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7), (0.9, 0.1)])
def test_gradient_is_the_closed_form(alpha, beta):
    """d/dlogits of alpha NLL + beta KL is (alpha + beta) softmax - alpha onehot - beta p_ref, row by row."""
    tuned, reference = logits(8, 13).requires_grad_(), logits(8, 13, seed=1)
    targets = torch.arange(8) % 13
    (alpha * token_nll(tuned, targets) + beta * token_kl(reference, tuned)).sum().backward()

    rows = zip(tuned.tolist(), reference.tolist(), targets.tolist(), strict=True)
    for row, (own, other, target) in enumerate(rows):
        p = [math.exp(x) for x in log_probabilities(own)]
        p_ref = [math.exp(x) for x in log_probabilities(other)]
        expected = [(alpha + beta) * p[v] - alpha * (v == target) - beta * p_ref[v] for v in range(13)]
        assert tuned.grad[row].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-14)
