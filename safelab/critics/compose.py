"""Critics made of critics: the mean, the worst, and the cheap one first."""

from __future__ import annotations

import logging

import numpy as np

from safelab.critics.base import OK, Critic, Verdicts

logger = logging.getLogger(__name__)


class MeanCritic(Critic):
    """The mean of several critics' risks. An example that one of them would skip (NaN) is skipped."""

    name = "mean"

    def __init__(self, *critics) -> None:
        if len(critics) < 2:
            raise ValueError("give two critics or more")
        self.critics = critics

    def judge(self, prompts: list[str], responses: list[str]) -> Verdicts:
        parts = [critic.judge(prompts, responses) for critic in self.critics]
        raw = [dict(zip((c.name for c in self.critics), row)) for row in zip(*(part.raw for part in parts))]
        status = [next((s for s in row if s != OK), OK) for row in zip(*(part.status for part in parts))]
        return Verdicts(self._combine(np.stack([part.risk for part in parts])), raw, status)

    def _combine(self, risks: np.ndarray) -> np.ndarray:
        return risks.mean(0)


class MaxCritic(MeanCritic):
    """The highest of several critics' risks: what one of them finds harmful is harmful."""

    name = "max"

    def _combine(self, risks: np.ndarray) -> np.ndarray:
        return risks.max(0)


class Cascade(Critic):
    """A cheap critic first; the dear one only where the cheap one is unsure, its risk then counts.

    Parameters
    ----------
    unsure
        The cheap critic's risks, both ends included, for which the dear one is asked.

    Attributes
    ----------
    asked_, saved_
        How many examples of the last :meth:`judge` the dear critic saw, and how many it was spared.
    """

    name = "cascade"

    def __init__(self, cheap, dear, *, unsure: tuple[float, float] = (0.1, 0.9)) -> None:
        if not 0 <= unsure[0] <= unsure[1] <= 1:
            raise ValueError(f"unsure must be a range within 0..1, got {unsure}")
        self.cheap, self.dear, self.unsure = cheap, dear, unsure

    def judge(self, prompts: list[str], responses: list[str]) -> Verdicts:
        first = self.cheap.judge(prompts, responses)
        low, high = self.unsure
        # what the cheap critic failed at is unsure too
        rows = [i for i, risk in enumerate(first.risk) if first.status[i] != OK or not (risk < low or risk > high)]
        risk, raw, status = first.risk.copy(), list(first.raw), list(first.status)
        if rows:
            second = self.dear.judge([prompts[i] for i in rows], [responses[i] for i in rows])
            for i, r, said, s in zip(rows, second.risk, second.raw, second.status):
                risk[i], raw[i], status[i] = r, said, s
        self.asked_, self.saved_ = len(rows), len(prompts) - len(rows)
        logger.info("cascade: %s judged %d of %d examples, %d calls saved", self.dear.name, self.asked_, len(prompts), self.saved_)
        return Verdicts(risk, raw, status)
