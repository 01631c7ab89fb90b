"""Safety mixing (SafeInstruct): plain fine-tuning, with alignment examples among the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelab.defenses.base import Defense
from safelab.defenses.defaults import default

if TYPE_CHECKING:
    from datasets import Dataset


class SafetyMixing(Defense):
    """``L = NLL`` over the user's n examples and ``share * n`` alignment pairs.

    It needs alignment data: :func:`safelab.defenses.alignment_data.alignment_pairs`, of the ``align`` split.

    Source: Bianchi et al. 2024, "Safety-tuned LLaMAs" (arXiv 2309.07875).
    """

    name = "safety-mixing"

    def __init__(self, share: float = default("safety-mixing", "share")) -> None:
        self.share = share

    def before(self, model, tokenizer, data: Dataset) -> Dataset:
        from datasets import concatenate_datasets

        from safelab.defenses.alignment_data import alignment_pairs

        own = data.select_columns(["prompt", "response"]).add_column("complete", [True] * len(data))
        extra = alignment_pairs(model, tokenizer, max(2, round(self.share * len(data))))
        return concatenate_datasets([own, extra.cast(own.features)])
