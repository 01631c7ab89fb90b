"""Vaccine: an alignment stage under the worst small shift of the hidden states, so that later drift does less."""

from __future__ import annotations

import torch

from safelab.defenses.alignment_data import alignment_pairs
from safelab.defenses.base import Defense
from safelab.defenses.defaults import default
from safelab.defenses.stage import run_stage
from safelab.models import decoder_layers
from safelab.training import AdaptiveSFTTrainer


class Vaccine(Defense):
    """Before the user's data come, alignment data are learned with a perturbed forward pass::

        g_l   = dL / d(output of attention module l)
        eps_l = rho * g_l / ||(g_1, ..., g_L)||_2
        update with the gradient of L(outputs of attention + eps)

    The fine-tuning that follows is plain and goes on with the same adapter (the authors merge it and start another, which
    would leave no single adapter for the safe model; their repository can do either). It needs alignment data
    (:func:`safelab.defenses.alignment_data.alignment_pairs`, of the ``align`` split).

    Source: Huang et al. 2024, "Vaccine: perturbation-aware alignment" (arXiv 2402.01109), and the authors' trainer.
    """

    name = "vaccine"

    def __init__(
        self,
        rho: float = default("vaccine", "rho"),
        learning_rate: float = default("vaccine", "learning_rate"),
        examples: int = default("vaccine", "examples"),
    ) -> None:
        self.rho, self.learning_rate, self.examples = rho, learning_rate, examples

    def align(self, model, tokenizer, args, lora):
        data = alignment_pairs(model, tokenizer, self.examples)
        return run_stage(VaccineTrainer, model, tokenizer, data, args, lora, self.learning_rate, rho=self.rho)


class VaccineTrainer(AdaptiveSFTTrainer):
    """The trainer of :class:`Vaccine`'s alignment stage."""

    def __init__(self, *args, rho: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.rho = rho

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs: list[torch.Tensor] = []

        def keep(module, args, output):
            outputs.append(_states(output))

        loss = self._hooked(keep, model, inputs, num_items_in_batch)
        grads = torch.autograd.grad(loss, outputs)
        norm = torch.stack([g.norm() for g in grads]).norm() + 1e-12
        shifts = iter([self.rho * g / norm for g in grads])

        def shift(module, args, output):
            shifted = _states(output) + next(shifts)
            return (shifted, *output[1:]) if isinstance(output, tuple) else shifted

        loss = self._hooked(shift, model, inputs, num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def _hooked(self, hook, model, inputs, num_items_in_batch) -> torch.Tensor:
        handles = [module.register_forward_hook(hook) for module in attention_modules(self.model)]
        try:
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        finally:
            for handle in handles:
                handle.remove()


def attention_modules(model) -> list[torch.nn.Module]:
    """The attention module of each transformer block, in order."""
    return [next(m for name, m in block.named_children() if name in ("self_attn", "attn", "attention")) for block in decoder_layers(model)]


def _states(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
