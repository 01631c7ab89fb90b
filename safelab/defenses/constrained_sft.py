"""Constrained-SFT: tokens that have moved away from the safe model are learned less, the first few above all."""

from __future__ import annotations

import torch

from safelab.defenses.base import Defense
from safelab.defenses.defaults import default


class ConstrainedSFT(Defense):
    """``-sum_t w_t log pi(y_t)`` with ``w_t = max(floor, 2 (1 - sigmoid(beta_t (log pi(y_t) - log pi_ref(y_t)))))``, detached.

    That is the gradient of ``-sum_t (2 / beta_t) log sigmoid(beta_t (log pi - log pi_ref))``: a token that has become
    likelier than it was under the safe model weighs less than 1, the sooner the larger its beta. beta is ``first`` for the
    first token, ``opening`` up to token ``opening_length``, ``later`` from then on. It needs nothing but the user's data.

    Source: Qi et al. 2024, "Safety alignment should be made more than just a few tokens deep" (arXiv 2406.05946), eq. 3.
    """

    name = "constrained-sft"

    def __init__(
        self,
        first: float = default("constrained-sft", "first"),
        opening: float = default("constrained-sft", "opening"),
        later: float = default("constrained-sft", "later"),
        opening_length: int = default("constrained-sft", "opening_length"),
        floor: float = default("constrained-sft", "floor"),
    ) -> None:
        self.first, self.opening, self.later, self.opening_length, self.floor = first, opening, later, opening_length, floor

    def token_loss(self, logp, safe_logp, position, risk):
        """The loss of each token, ``(n,)``."""
        beta = torch.where(position < self.opening_length, self.opening, self.later)
        beta = torch.where(position == 0, self.first, beta)
        weight = 2 * torch.sigmoid(-beta * (logp.detach() - safe_logp))
        return -weight.clamp(min=self.floor) * logp

    def trainer(self, model, tokenizer, args, data, **kwargs):
        from safelab.defenses.token_loss import TokenLossTrainer

        return TokenLossTrainer(model, args, data, processing_class=tokenizer, token_loss=self.token_loss, **kwargs)
