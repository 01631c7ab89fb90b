"""Critics made of critics: the mean, the worst, and the cheap one first."""

from __future__ import annotations

import logging

import numpy as np

from safelab.critics.base import OK, Critic, Verdicts, held_out

logger = logging.getLogger(__name__)


class KnownRisks(Critic):
    """Risks that are known already, such as a scorecard's held-out ones, to compose critics of without asking again.

    ``risks`` are in 0..1, or None for a text without a verdict, which is skipped. A text that is not among
    (``prompts``, ``responses``) raises KeyError.
    """

    def __init__(self, name: str, prompts: list[str], responses: list[str], risks: list[float | None]) -> None:
        self.name = name
        self.known = {(p, r): np.nan if risk is None else risk for p, r, risk in zip(prompts, responses, risks)}

    def judge(self, prompts: list[str], responses: list[str]) -> Verdicts:
        risk = np.array([self.known[pair] for pair in zip(prompts, responses)], dtype=float)
        return Verdicts(risk, risk.tolist(), ["unknown" if np.isnan(r) else OK for r in risk])


class MeanCritic(Critic):
    """The mean of several critics' risks. An example that one of them would skip (NaN) is skipped."""

    name = "mean"

    def __init__(self, *critics) -> None:
        if len(critics) < 2:
            raise ValueError("give two critics or more")
        self.critics = critics

    def judge(self, prompts: list[str], responses: list[str]) -> Verdicts:
        return self._joined([critic.judge(prompts, responses) for critic in self.critics])

    def cross_judge(self, labels, prompts, responses, *task) -> tuple[Verdicts, None]:
        """As :func:`safelab.critics.base.held_out` says, of each part; the threshold is left to the caller."""
        return self._joined([held_out(critic, labels, prompts, responses, *task)[0] for critic in self.critics]), None

    def _joined(self, parts: list[Verdicts]) -> Verdicts:
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
        self.critics = (cheap, dear)

    def judge(self, prompts: list[str], responses: list[str]) -> Verdicts:
        first = self.cheap.judge(prompts, responses)
        rows = self._unsure(first)
        second = self.dear.judge([prompts[i] for i in rows], [responses[i] for i in rows]) if rows else None
        return self._joined(first, second, rows)

    def cross_judge(self, labels, prompts, responses, *task) -> tuple[Verdicts, None]:
        """As :func:`safelab.critics.base.held_out` says, of both; a dear critic that learns has to judge all rows for that."""
        first, _ = held_out(self.cheap, labels, prompts, responses, *task)
        rows = self._unsure(first)
        if rows and hasattr(self.dear, "cross_judge"):
            every, _ = self.dear.cross_judge(labels, prompts, responses, *task)
            second = Verdicts(every.risk[rows], [every.raw[i] for i in rows], [every.status[i] for i in rows])
        else:
            second = self.dear.judge([prompts[i] for i in rows], [responses[i] for i in rows]) if rows else None
        return self._joined(first, second, rows), None

    def plan(self, prompts: list[str], responses: list[str]) -> dict:
        """What the dear critic's judging would take (:meth:`safelab.critics.JudgeCritic.plan`), the cheap one having judged."""
        rows = self._unsure(self.cheap.judge(prompts, responses))
        return self.dear.plan([prompts[i] for i in rows], [responses[i] for i in rows]) | {"examples": len(prompts), "saved": len(prompts) - len(rows)}

    def _unsure(self, first: Verdicts) -> list[int]:
        low, high = self.unsure
        # what the cheap critic failed at is unsure too
        return [i for i, risk in enumerate(first.risk) if first.status[i] != OK or not (risk < low or risk > high)]

    def _joined(self, first: Verdicts, second: Verdicts | None, rows: list[int]) -> Verdicts:
        risk, raw, status = first.risk.copy(), list(first.raw), list(first.status)
        for i, r, said, s in zip(rows, second.risk, second.raw, second.status) if second else ():
            risk[i], raw[i], status[i] = r, said, s
        self.asked_, self.saved_ = len(rows), len(risk) - len(rows)
        logger.info("cascade: %s judged %d of %d examples, %d calls saved", self.dear.name, self.asked_, len(risk), self.saved_)
        return Verdicts(risk, raw, status)
