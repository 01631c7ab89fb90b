"""A trainer for losses that weigh each response token by its log-probability now and under the safe model."""

from __future__ import annotations

import numpy as np
import torch

from safelab.losses import token_nll
from safelab.models import eval_mode
from safelab.reference import response_logits, response_positions
from safelab.training import AdaptiveSFTTrainer


class TokenLossTrainer(AdaptiveSFTTrainer):
    """``sum_t token_loss_t`` over response tokens, by the mean that ``mean_over`` says; needs LoRA.

    Parameters
    ----------
    token_loss
        ``token_loss(logp, safe_logp, position, risk) -> loss``, all ``(n,)``: log-probabilities in nats of the n response
        tokens of a batch (the safe model's without a gradient), their places in their responses from 0, their risks.
    """

    def __init__(self, *args, token_loss, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.token_loss = token_loss
        self._nlls: list[float] = []
        self._safe = self._safe_logps()

    @torch.no_grad()
    def _safe_logps(self, size: int = 32) -> dict[int, torch.Tensor]:
        """Index of an example -> its response tokens' log-probabilities with the adapter off: constants, computed once."""
        rows, found = sorted(self.train_dataset, key=lambda row: len(row["input_ids"])), {}
        with eval_mode(self.model), self.model.disable_adapter(), self.accelerator.autocast():
            for start in range(0, len(rows), size):
                batch = {k: v.to(self.model.device) for k, v in self.data_collator(rows[start : start + size]).items()}
                mask, logps = self._logps(self.model, batch)
                found |= dict(zip(batch["index"].tolist(), logps.split(mask.sum(1).tolist())))
        return found

    @staticmethod
    def _logps(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Where response tokens are predicted ``(batch, length)``, and their log-probabilities ``(n,)``."""
        mask, targets = response_positions(batch["labels"])
        return mask, -token_nll(response_logits(model, {k: batch[k] for k in ("input_ids", "attention_mask")}, mask), targets)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask, logps = self._logps(model, inputs)
        row, position = mask.nonzero()[:, 0], (mask.cumsum(1) - 1)[mask]
        risk = inputs["risk"][mask] if inputs["risk"].dim() == 2 else inputs["risk"][row]
        loss = self.token_loss(logps, torch.cat([self._safe[i] for i in inputs["index"].tolist()]), position, risk)
        self._nlls += (-logps.detach()).tolist()
        if self.args.mean_over == "example":
            loss = loss / mask.sum(1)[row]
        here = len(loss) if self.args.mean_over == "token" else len(mask)
        loss = loss.sum() / (here if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the mean over processes that DDP takes becomes a sum
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean NLL of response tokens since the last log, on this process."""
        if self._nlls:
            logs["nll"] = float(np.mean(self._nlls))
        self._nlls = []
        super().log(logs, start_time)
