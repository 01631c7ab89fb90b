"""The objective's two terms, exact: response NLL and forward KL over the full vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
