"""risk -> (alpha, beta): how strongly each example is held to the reference policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KINDS = ("linear", "clamp", "threshold")
GRANULARITIES = ("example", "token", "batch", "batch-max")


@dataclass(frozen=True)
class RiskSchedule:
    """Risk s in [0, 1] -> ``beta`` and ``alpha = 1 - beta`` (arXiv 2602.17546, section 3).

    Parameters
    ----------
    beta_min, beta_max
        Bounds of beta, ``0 <= beta_min <= beta_max <= 1``. The paper's code uses 0.1 and 0.9.
        Equal bounds give a constant weight; both 0 give plain fine-tuning.
    kind
        ``"linear"``: ``beta_min + (beta_max - beta_min) s``, as in the paper's text.
        ``"clamp"``: ``clamp((r - 2) / 3, beta_min, beta_max)`` with the judge's score ``r = 1 + 4 s``, as in its code:
        scores of 1 and 2 are as harmless as can be, only from 2.3 on does beta rise.
        ``"threshold"``: beta_max from ``s >= threshold``, else beta_min.
    threshold
        For the kind of that name.
    granularity
        Whose risk it is. ``"example"``: each has its own beta. ``"token"``: so has each response token, for critics that
        give a risk per token. ``"batch"``: all examples of a step share that of their mean risk, as the paper's text
        has it; one harmful example among seven harmless ones is then hardly held at all. ``"batch-max"``: they share
        that of the riskiest.
    smoothing
        lambda of ``s~_t = lambda s~_{t-1} + (1 - lambda) s_t``, 0 for none. It runs over steps, so it needs a risk
        of the whole step: granularity ``"batch"`` or ``"batch-max"``.
    """

    beta_min: float = 0.1
    beta_max: float = 0.9
    kind: str = "linear"
    threshold: float = 0.5
    granularity: str = "example"
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min <= self.beta_max <= 1:
            raise ValueError(f"expected 0 <= beta_min <= beta_max <= 1, got {self.beta_min} and {self.beta_max}")
        if self.kind not in KINDS:
            raise ValueError(f"schedule {self.kind!r}: expected one of {', '.join(KINDS)}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold}: expected a risk in [0, 1]")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity {self.granularity!r}: expected one of {', '.join(GRANULARITIES)}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing {self.smoothing}: expected a number in [0, 1)")
        if self.smoothing and not self.of_step:
            raise ValueError("smoothing runs over steps: it needs granularity 'batch' or 'batch-max'")

    @property
    def needs_reference(self) -> bool:
        """False where beta is 0 whatever the risk."""
        return self.beta_max > 0

    @property
    def of_step(self) -> bool:
        """Whether all examples of an optimiser step share one risk."""
        return self.granularity.startswith("batch")

    def pool(self, risk: torch.Tensor) -> torch.Tensor:
        """Risks of the examples of a step ``(n,)`` -> the one they share, a scalar."""
        return risk.max() if self.granularity == "batch-max" else risk.mean()

    def smooth(self, risk: float, before: float | None) -> float:
        """The step's risk, drawn towards that of the steps before (None: there are none)."""
        return risk if before is None else self.smoothing * before + (1 - self.smoothing) * risk

    def __call__(self, risk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Risk in [0, 1], of any shape -> alpha and beta of that shape.

        Raises
        ------
        ValueError
            A risk is not a number in [0, 1].
        """
        if bool(((risk < 0) | (risk > 1) | risk.isnan()).any()):
            raise ValueError(f"risk outside [0, 1]: {risk.tolist()}")
        if self.kind == "linear":
            beta = self.beta_min + (self.beta_max - self.beta_min) * risk
        elif self.kind == "clamp":
            beta = ((1 + 4 * risk - 2) / 3).clamp(self.beta_min, self.beta_max)
        else:
            beta = self.beta_min + (self.beta_max - self.beta_min) * (risk >= self.threshold).to(risk.dtype)
        return 1 - beta, beta
