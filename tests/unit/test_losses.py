"""The objective's two terms against plain Python loops in double precision, and their gradients against the closed form."""

import math

import pytest
import torch

from safelab.losses import Head, head_loss, moments, token_kl, token_nll


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


# ------------------------------------------------------------------------------- from the head's input


def head_case(dtype=torch.float64, bias=False, n=37, width=24, vocabulary=101):
    """Hidden states, head and reference of n tokens, with weights of all kinds: both terms, either one, neither."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, b = random(n, width), random(vocabulary, width), random(vocabulary) if bias else None
    reference = Head(hidden + 0.3 * random(n, width), weight.clone(), None if b is None else b.clone())
    alpha = torch.rand(n, generator=generator, dtype=torch.float64)
    alpha[3], beta = 0, (1 - alpha) * 0.7
    beta[4], alpha[5], beta[5] = 0, 0, 0
    return hidden, weight, b, torch.arange(n) * 7 % vocabulary, alpha, beta, reference


def by_definition(hidden, weight, bias, targets, alpha, beta, reference):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    theirs = torch.nn.functional.linear(*reference)
    nll, kl = token_nll(logits, targets), token_kl(theirs, logits)
    return (alpha * nll + beta * kl).sum(), nll, torch.where(beta > 0, kl, 0)


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors if t is not None]


@pytest.mark.parametrize("memory", [256, 0.01])  # all rows at once, and six at a time
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("known", ["moments", "head"])
def test_from_the_heads_input_loss_and_gradients_are_those_of_the_definition(known, bias, memory):
    hidden, weight, b, *rest, reference = head_case(bias=bias)
    (ours := leaves(hidden, weight, b)), (theirs := leaves(hidden, weight, b))
    expected = by_definition(*theirs, *([] if bias else [None]), *rest, reference)
    given = moments(*reference, memory=memory) if known == "moments" else reference
    result = head_loss(*ours, *([] if bias else [None]), *rest, given, memory=memory)
    for a, e in zip(result, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    (3 * result[0]).backward()
    (3 * expected[0]).backward()
    for a, e in list(zip(ours, theirs))[: 1 if known == "moments" else None]:  # moments are for a frozen head
        torch.testing.assert_close(a.grad, e.grad, rtol=1e-11, atol=1e-12)


def test_without_a_reference_it_is_the_nll_and_the_head_learns():
    hidden, weight, _, targets, alpha, *_ = head_case()
    h, w = leaves(hidden, weight)
    loss, _, kl = head_loss(h, w, None, targets, alpha, torch.zeros_like(alpha), None, memory=0.01)
    loss.backward()
    expected = leaves(hidden, weight)
    (alpha * token_nll(expected[0] @ expected[1].T, targets)).sum().backward()
    assert kl.abs().max() == 0
    torch.testing.assert_close(h.grad, expected[0].grad)
    torch.testing.assert_close(w.grad, expected[1].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("known", ["moments", "head"])
def test_where_the_policy_is_the_reference_kl_and_its_gradient_are_zero(known, dtype):
    """Whatever the rounding: both come about in the same way, so they cancel."""
    hidden, weight, _, targets, *_ = head_case(torch.float32)
    (h,) = leaves(hidden)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        given = moments(hidden, weight, None) if known == "moments" else Head(hidden, weight)
        loss, _, kl = head_loss(h, weight, None, targets, torch.zeros(37), torch.ones(37), given)
    loss.backward()
    assert kl.abs().max() < 1e-5
    assert h.grad.abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 1.2), (torch.float16, 1.2)])
@pytest.mark.parametrize("known", ["moments", "head"])
def test_in_half_precision_it_is_as_near_to_double_precision_as_autograd_is(known, dtype, allowed):
    hidden, weight, _, targets, alpha, beta, reference = head_case(torch.float32, n=200, width=64, vocabulary=500)
    rest = (None, targets, alpha.float(), beta.float())
    (exact,) = leaves(hidden.double())
    by_definition(exact, weight.double(), *rest, Head(reference.hidden.double(), reference.weight.double()))[0].backward()
    errors = []
    for ours in (True, False):
        (h,) = leaves(hidden)
        with torch.autocast("cpu", dtype):
            given = moments(*reference) if known == "moments" and ours else reference
            loss = (head_loss if ours else by_definition)(h, weight, *rest, given)[0]
        loss.backward()
        errors.append((h.grad - exact.grad).norm().item())
    assert errors[0] < allowed * errors[1]
    assert errors[0] < 0.02 * exact.grad.norm().item()


def test_a_surprising_token_has_a_finite_loss():
    """Its probability is 0 in float32; its NLL is not infinite."""
    hidden, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [0.0]])
    _, nll, _ = head_loss(hidden, weight, None, torch.tensor([1]), torch.ones(1), torch.zeros(1))
    assert nll.item() == pytest.approx(200)
