"""The same pull to the safe model for every example."""

from safelab.defenses.base import Defense


class ConstantKL(Defense):
    """``(1 - beta) * NLL + beta * KL(pi_ref || pi_theta)`` with a fixed beta, risk or no risk."""

    name = "constant-kl"

    def __init__(self, beta: float = 0.5) -> None:
        self.beta = beta

    def settings(self) -> dict:
        return {"beta_min": self.beta, "beta_max": self.beta}
