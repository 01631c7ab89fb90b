"""Lisa: steps on alignment data and on the user's take turns, each held near where the other left off."""

from __future__ import annotations

from safelab.defenses.alignment_data import alignment_pairs, endless_batches
from safelab.defenses.base import Defense
from safelab.defenses.defaults import default
from safelab.training import AdaptiveSFTTrainer, tokenize_pairs


class Lisa(Defense):
    """``align_steps`` on alignment data, then ``user_steps`` on the user's, and so on, each with the loss

        NLL + rho / 2 * sum ||w - w_other||^2

    over the trained parameters; ``w_other`` is where the other state ended last (at first: the start). The proximal term
    is left out in the first ``warmup`` share of all steps. An alignment step takes the place of a step on the user's data,
    whose batch is passed over, so the number of steps is everyone's. It needs alignment data
    (:func:`safelab.defenses.alignment_data.alignment_pairs`, of the ``align`` split).

    Source: Huang et al. 2024, "Lisa: lazy safety alignment" (arXiv 2405.18641), and the authors' trainer.
    """

    name = "lisa"

    def __init__(
        self,
        align_steps: int = default("lisa", "align_steps"),
        user_steps: int = default("lisa", "user_steps"),
        rho: float = default("lisa", "rho"),
        warmup: float = default("lisa", "warmup"),
        examples: int = default("lisa", "examples"),
    ) -> None:
        self.align_steps, self.user_steps, self.rho, self.warmup, self.examples = align_steps, user_steps, rho, warmup, examples

    def trainer(self, model, tokenizer, args, data, **kwargs):
        alignment = alignment_pairs(model, tokenizer, self.examples)
        return LisaTrainer(model, args, data, processing_class=tokenizer, defense=self, alignment=alignment, **kwargs)


class LisaTrainer(AdaptiveSFTTrainer):
    """The trainer of :class:`Lisa`."""

    def __init__(self, *args, defense: Lisa, alignment, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.defense = defense
        rows = tokenize_pairs(self.processing_class, alignment, max_length=self.args.max_length)
        seed = self.args.seed + self.accelerator.process_index
        self._alignment = endless_batches(rows, self.data_collator, self.args.per_device_train_batch_size, seed)
        self._aligning: bool | None = None
        self.other: dict = {}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, in the alignment state replaced by alignment data."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        aligning = self.state.global_step % (self.defense.align_steps + self.defense.user_steps) < self.defense.align_steps
        if aligning != self._aligning:  # the state just left ended where the weights are now
            self._aligning, self.other = aligning, {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        if aligning:
            batches = [next(self._alignment) for _ in batches]
            items = self._get_num_items_in_batch(batches, device)
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if self.state.global_step > self.defense.warmup * self.state.max_steps:
            distance = sum((p - self.other[n]).square().sum() for n, p in self.model.named_parameters() if p.requires_grad)
            loss = loss + self.defense.rho / 2 * distance / self.current_gradient_accumulation_steps
        return (loss, None) if return_outputs else loss
