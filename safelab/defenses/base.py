"""What a defence may do: change the data before fine-tuning, and the objective during it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from datasets import Dataset


class Defense:
    """Base class; a defence overrides what it changes."""

    name: ClassVar[str]

    def before(self, model, tokenizer, data: Dataset) -> Dataset:
        """The fine-tuning set to train on, made from the user's set; ``model`` is the safe model, untouched."""
        return data

    def settings(self) -> dict:
        """Fields of :class:`safelab.training.AdaptiveSFTConfig` that define the objective."""
        raise NotImplementedError

    def parameters(self) -> dict:
        """Everything that sets this defence apart from another of its class, as JSON can hold it; keys stored rows."""
        return {name: getattr(value, "name", value) for name, value in vars(self).items()}
