"""Plain fine-tuning: no defence at all."""

from safelab.defenses.base import Defense


class SFT(Defense):
    """Response-only NLL: alpha = 1, beta = 0 whatever the risk."""

    name = "sft"

    def settings(self) -> dict:
        return {"beta_min": 0.0, "beta_max": 0.0}
