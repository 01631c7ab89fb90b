"""Booster: an alignment stage after which one step on harmful data lowers the harmful loss less."""

from __future__ import annotations

import torch

from safelab.defenses.alignment_data import alignment_pairs, endless_batches, harmful_pairs
from safelab.defenses.base import Defense
from safelab.defenses.defaults import default
from safelab.defenses.stage import run_stage
from safelab.training import AdaptiveSFTTrainer, tokenize_pairs


class Booster(Defense):
    """Before the user's data come, the adapter w learns from alignment and from harmful data::

        g  = grad L_harm(w)
        w' = w - step * g / ||g||_2
        update with grad L_align(w) + strength * (g - grad L_harm(w'))

    The second term is the gradient, to first order, of the harmful loss that one normalised step on harmful data would
    take away. The fine-tuning that follows is plain and goes on with the same adapter, as the authors' does. It needs alignment data
    (:func:`safelab.defenses.alignment_data.alignment_pairs`, of the ``align`` split) and harmful pairs
    (:func:`safelab.defenses.alignment_data.harmful_pairs`, of the ``probe`` split: none of the attacker's).

    Source: Huang et al. 2024, "Booster: attenuating harmful perturbation" (arXiv 2409.01586), and the authors' trainer.
    """

    name = "booster"

    def __init__(
        self,
        strength: float = default("booster", "strength"),
        step: float = default("booster", "step"),
        learning_rate: float = default("booster", "learning_rate"),
        examples: int = default("booster", "examples"),
        harmful: int = default("booster", "harmful"),
    ) -> None:
        self.strength, self.step, self.learning_rate, self.examples, self.harmful = strength, step, learning_rate, examples, harmful

    def align(self, model, tokenizer, args, lora):
        data = alignment_pairs(model, tokenizer, self.examples)
        return run_stage(BoosterTrainer, model, tokenizer, data, args, lora, self.learning_rate, defense=self, harmful=harmful_pairs(self.harmful))


class BoosterTrainer(AdaptiveSFTTrainer):
    """The trainer of :class:`Booster`'s alignment stage."""

    def __init__(self, *args, defense: Booster, harmful, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.defense = defense
        rows = tokenize_pairs(self.processing_class, harmful, max_length=self.args.max_length)
        seed = self.args.seed + self.accelerator.process_index
        self._harmful = endless_batches(rows, self.data_collator, self.args.per_device_train_batch_size, seed)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        weights = [p for p in model.parameters() if p.requires_grad]
        batch = self._prepare_inputs(next(self._harmful))
        here = self._harm_gradient(model, batch, weights)
        norm = torch.stack([g.norm() for g in here]).norm() + 1e-12
        kept = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for w, g in zip(weights, here):
                w -= self.defense.step * g / norm
        after = self._harm_gradient(model, batch, weights)
        with torch.no_grad():
            for w, k in zip(weights, kept):
                w.copy_(k)  # the very same numbers: adding the step back would round
        loss = super().training_step(model, inputs, num_items_in_batch)
        for w, g, h in zip(weights, here, after):
            w.grad += self.defense.strength * (g - h) / self.current_gradient_accumulation_steps
        return loss

    def _harm_gradient(self, model, batch: dict, weights: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch)
        return torch.autograd.grad(loss, weights)
