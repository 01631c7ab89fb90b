"""What a defence may do: change data or model before fine-tuning, the objective during it, and the adapter afterwards."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from safelab.critics.base import members, verdicts_of

if TYPE_CHECKING:
    from datasets import Dataset

    from safelab.training import AdaptiveSFTConfig, AdaptiveSFTTrainer

logger = logging.getLogger(__name__)


class Defense:
    """Base class; a defence overrides what it changes. Its stages, in the order in which they run:

    :meth:`before` makes the data, :meth:`align` the model, :meth:`settings` and :meth:`trainer` the objective, and
    :meth:`after` works on the tuned adapter. The result is always one ordinary adapter for the safe model.
    """

    name: ClassVar[str]
    own_critic: ClassVar[str | None] = None
    """The kind of critic that is asked where none is given; None for a defence that asks none."""
    failures_: dict[str, int] = {}  # noqa: RUF012 - by status, the examples on which the critic gave no verdict, set by before()

    def before(self, model, tokenizer, data: Dataset) -> Dataset:
        """The fine-tuning set to train on, made from the user's set; ``model`` is the safe model, untouched."""
        return data

    def align(self, model, tokenizer, args: AdaptiveSFTConfig, lora):
        """The model to fine-tune, made from the safe one: itself, or a PEFT model whose adapter is trained on.

        ``args`` and ``lora`` (a PEFT configuration) are those of the fine-tuning that follows.
        """
        return model

    def settings(self) -> dict:
        """Fields of :class:`safelab.training.AdaptiveSFTConfig` that define the objective."""
        return {"beta_min": 0.0, "beta_max": 0.0}

    def trainer(self, model, tokenizer, args: AdaptiveSFTConfig, data: Dataset, **kwargs: Any) -> AdaptiveSFTTrainer:
        """The trainer, with this defence's update rule; ``kwargs`` are the trainer's."""
        from safelab.training import AdaptiveSFTTrainer

        return AdaptiveSFTTrainer(model, args, data, processing_class=tokenizer, **kwargs)

    def after(self, model, tokenizer):
        """The result, made from the tuned PEFT model."""
        return model

    def parameters(self) -> dict:
        """Everything that sets this defence apart from another of its class, as JSON can hold it; keys stored rows."""
        return {name: getattr(value, "name", value) for name, value in vars(self).items() if not name.endswith("_")}

    def critic_name(self) -> str | None:
        """The critic behind the risks, as :func:`safelab.critics.base.members` says it; None for a defence that asks none."""
        critic = getattr(self, "critic", None)
        return self.own_critic if critic is None else members(critic)

    def ask(self, critic, prompts: list[str], responses: list[str]) -> np.ndarray:
        """The critic's risks, ``(n,)``, NaN where its failure policy is to skip; what failed is logged and kept in ``failures_``."""
        verdicts = verdicts_of(critic, prompts, responses)
        self.failures_ = verdicts.failures
        skipped = int(np.isnan(verdicts.risk).sum())
        if self.failures_:
            logger.warning("%s: no verdict on %d of %d texts (%s); %d are skipped, the others count with a risk of their own",
                           self.name, sum(self.failures_.values()), len(prompts), ", ".join(f"{k} {n}" for k, n in self.failures_.items()), skipped)  # fmt: skip
        return verdicts.risk
