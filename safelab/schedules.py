"""risk -> (alpha, beta): how strongly each example is held to the reference policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GRANULARITIES = ("example", "batch")


@dataclass(frozen=True)
class RiskSchedule:
    """``beta = beta_min + (beta_max - beta_min) * s`` and ``alpha = 1 - beta`` (arXiv 2602.17546, section 3).

    Parameters
    ----------
    beta_min, beta_max
        Bounds of beta, ``0 <= beta_min <= beta_max <= 1``. The paper's code uses 0.1 and 0.9.
        Equal bounds give a constant weight; both 0 give plain fine-tuning.
    granularity
        ``"example"``: each example has its own beta. ``"batch"``: all share that of the batch's mean risk, as
        the paper's text has it; one harmful example among seven harmless ones is then hardly held at all.
    """

    beta_min: float = 0.1
    beta_max: float = 0.9
    granularity: str = "example"

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min <= self.beta_max <= 1:
            raise ValueError(f"expected 0 <= beta_min <= beta_max <= 1, got {self.beta_min} and {self.beta_max}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity {self.granularity!r}: expected one of {', '.join(GRANULARITIES)}")

    @property
    def needs_reference(self) -> bool:
        """False where beta is 0 whatever the risk."""
        return self.beta_max > 0

    def __call__(self, risk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Risk ``(batch,)`` in [0, 1] -> alpha ``(batch,)``, beta ``(batch,)``."""
        if bool(((risk < 0) | (risk > 1) | risk.isnan()).any()):
            raise ValueError(f"risk outside [0, 1]: {risk.tolist()}")
        if self.granularity == "batch":
            risk = risk.mean().expand_as(risk)
        beta = self.beta_min + (self.beta_max - self.beta_min) * risk
        return 1 - beta, beta
