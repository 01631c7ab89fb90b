"""Plain fine-tuning: no defence at all."""

from safelab.defenses.base import Defense


class SFT(Defense):
    """Response-only NLL: alpha = 1, beta = 0 whatever the risk, which is what the base class does."""

    name = "sft"
