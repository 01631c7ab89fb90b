"""The objective's two terms, exact: response NLL and forward KL over the full vocabulary.

``token_nll`` and ``token_kl`` are the definitions, on logits. :func:`head_loss` is what training uses: the same loss
and gradient from the hidden states that enter the output head, a few rows at a time, so that logits of a whole batch
never exist. Three facts make it cheap.

1. The gradient with respect to a token's logits is known in closed form, ``(alpha + beta) p - alpha onehot - beta p_ref``,
   so it is made while the logits are at hand: nothing is kept for the backward pass, nothing computed twice.
2. With logits ``W h`` the log-normaliser ``A(h) = logsumexp(W h)`` has the gradient ``E_p[W]``, the *mean row* of the
   head under the model's own distribution. A KL between two such distributions is the Bregman divergence of A::

       KL(pi_ref || pi_theta) = A(h) - A(h_ref) - (h - h_ref) . m        m = E_ref[W]

   and its gradient with respect to h is ``E_theta[W] - m``.
3. So of the whole reference distribution only the vector m (as wide as a hidden state) and the number
   ``A(h_ref) - h_ref . m`` matter. They are constants of an example: computed once (:func:`moments`), the KL over the
   full vocabulary costs two dot products a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

LOSS_MEMORY = 256
"""Megabytes that logits may take at a time, by default."""


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``-log pi_theta(y)`` for each token, in nats: logits ``(n, vocabulary)``, targets ``(n,)`` -> ``(n,)`` float."""
    return F.cross_entropy(_full(logits), targets, reduction="none")


def token_kl(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Forward ``KL(pi_ref || pi_theta)`` for each token, in nats: two ``(n, vocabulary)`` -> ``(n,)`` float.

    The expectation is under the reference: where the safe model puts mass, the tuned one must keep some. Note
    the order of ``F.kl_div``: its *input* is the second distribution of the KL.
    """
    reference = F.log_softmax(_full(reference_logits), dim=-1)
    return F.kl_div(F.log_softmax(_full(logits), dim=-1), reference, reduction="none", log_target=True).sum(-1)


def _full(logits: torch.Tensor) -> torch.Tensor:
    # half precision is too coarse for a log-sum-exp over a vocabulary; float64 stays what it is
    return logits if logits.dtype == torch.float64 else logits.float()


# ------------------------------------------------------------------------------ from the head's input


class Moments(NamedTuple):
    """What the KL needs of a reference that shares the (frozen) output head, for n tokens."""

    mean: torch.Tensor
    """``(n, width)``: ``E_ref[W]``, the mean row of the head under the reference."""
    offset: torch.Tensor
    """``(n,)``: ``A(h_ref) - h_ref . mean``, in nats."""


class Head(NamedTuple):
    """A linear output head on its inputs: the reference's, where its moments are not known."""

    hidden: torch.Tensor
    """``(n, width)``"""
    weight: torch.Tensor
    """``(vocabulary, width)``"""
    bias: torch.Tensor | None = None


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    reference: Moments | Head | None = None,
    *,
    memory: float = LOSS_MEMORY,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``sum_t alpha_t NLL_t + beta_t KL_t`` of n response tokens, from what enters the output head.

    Parameters
    ----------
    hidden, weight, bias
        ``(n, width)``, ``(vocabulary, width)``, ``(vocabulary,)`` or None. Gradients reach all of them that ask.
    targets, alpha, beta
        ``(n,)`` each: the next tokens and the weights, which are not negative.
    reference
        The reference at the same n tokens; it may be None where every beta is 0. :class:`Moments` hold for a reference
        with this very head, and only while the head is frozen.
    memory
        Megabytes for logits: the tokens go through the head in groups of as many as fit. No result depends on it.

    Returns
    -------
    loss, nll, kl
        The sum, and the two terms ``(n,)`` of each token without a gradient, in nats. ``kl`` is 0 where beta is 0.
    """
    return _HeadLoss.apply(hidden, weight, bias, targets, alpha, beta, reference, memory)


@torch.no_grad()
def moments(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, memory: float = LOSS_MEMORY) -> Moments:
    """The reference's hidden states ``(n, width)`` and output head -> its :class:`Moments`."""
    weight, bias = _as_autocast(weight), _as_autocast(bias)
    means, offsets = [], []
    for part in _parts(len(hidden), len(weight), memory):
        rows = hidden[part].to(weight.dtype)
        p, norm = _softmax(F.linear(rows, weight, bias))
        means.append(_full(p.to(weight.dtype) @ weight))
        offsets.append(norm - torch.linalg.vecdot(_full(rows), means[-1]))
    return Moments(torch.cat(means), torch.cat(offsets))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, alpha, beta, reference, memory):
        w, b = _as_autocast(weight), _as_autocast(bias)
        # rows are scaled to alpha + beta = 1: the closed form then changes p in a few places only
        total = (alpha + beta).clamp(min=torch.finfo(alpha.dtype).tiny)
        nll, kl = (torch.zeros(len(hidden), dtype=_full(hidden[:0]).dtype, device=hidden.device) for _ in range(2))
        ctx.grads = [torch.empty_like(hidden), *(torch.zeros_like(t) if t is not None and t.requires_grad else None for t in (weight, bias))]
        for part in _parts(len(hidden), len(w), memory / 2 if isinstance(reference, Head) else memory):
            rows, target = hidden[part].to(w.dtype), targets[part, None]
            logits = F.linear(rows, w, b)
            p, norm = _softmax(logits)
            nll[part] = norm - logits.gather(1, target)[:, 0]
            a, k = ((x[part] / total[part])[:, None].to(p.dtype) for x in (alpha, beta))
            if isinstance(reference, Moments):
                mean = reference.mean[part].to(p.dtype)
                kl[part] = norm - torch.linalg.vecdot(_full(rows), mean) - reference.offset[part]
            elif reference is not None:
                theirs = F.linear(reference.hidden[part].to(w.dtype), _as_autocast(reference.weight), _as_autocast(reference.bias))
                p_ref, norm_ref = _softmax(theirs)
                kl[part] = torch.linalg.vecdot(p_ref, _full(theirs) - logits) + norm - norm_ref
                p.addcmul_(p_ref, k, value=-1)
            g = p.scatter_add_(1, target, -a)  # d loss / d logits of these rows, over alpha + beta
            scale = total[part, None]
            grad = (g.to(w.dtype) @ w).to(p.dtype)
            if isinstance(reference, Moments):
                grad -= k * mean
            ctx.grads[0][part] = grad * scale
            if ctx.grads[1] is not None:
                ctx.grads[1] += (g * scale).to(w.dtype).T @ rows
            if ctx.grads[2] is not None:
                ctx.grads[2] += (g * scale).sum(0)
        kl = torch.where(beta > 0, kl, 0)
        ctx.mark_non_differentiable(nll, kl)
        return (alpha * nll + beta * kl).sum(), nll, kl

    @staticmethod
    def backward(ctx, grad, *_):
        return (*(g if g is None else g * grad for g in ctx.grads), None, None, None, None, None)


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities ``(n, vocabulary)`` and log-normalisers ``(n,)``, float."""
    p = torch.softmax(logits, -1, dtype=_full(logits[:0]).dtype)
    return p, logits.amax(-1) - p.amax(-1).log()  # the largest p is at least 1 / vocabulary: its logarithm is safe


def _as_autocast(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Cast once as autocast would at every use: it keeps no copy of a frozen weight."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _parts(n: int, vocabulary: int, memory: float) -> list[slice]:
    """Groups of rows whose logits fit: 16 bytes each, what logits, probabilities and their copies in half precision take."""
    rows = max(1, int(memory * 1e6 / (16 * vocabulary)))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
