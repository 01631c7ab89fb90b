"""What a critic is, and what it hands back: a risk, what it said, and whether it could say anything at all."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import numpy as np

logger = logging.getLogger(__name__)

OK = "ok"
"""Status of an example that was judged; any other status names what went wrong."""
GAVE_UP = "gave up"
"""Status of an example that was not even tried, since too many before it had failed."""


class SafetyCritic(Protocol):
    """What training asks of a critic."""

    name: str

    def score(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """Risk of each example, ``(n,)`` in [0, 1]."""


@dataclass(frozen=True)
class Verdicts:
    """What a critic made of n examples.

    Attributes
    ----------
    risk
        ``(n,)`` in [0, 1]; NaN where an example is to be skipped.
    raw
        What the critic said of each, before it became a risk: a probability, a reply, a flag; None if nothing.
    status
        ``"ok"``, or what went wrong. An example that failed has the risk that the failure policy gives it.
    """

    risk: np.ndarray
    raw: list
    status: list[str]

    @property
    def counts(self) -> dict[str, int]:
        """How many examples have each status, the commonest first."""
        return dict(Counter(self.status).most_common())

    @property
    def failures(self) -> dict[str, int]:
        """The counts without those that went well."""
        return {status: n for status, n in self.counts.items() if status != OK}


class Critic:
    """Base class: a critic says :meth:`judge`; its :meth:`score` is the risks alone."""

    name: str

    def judge(self, prompts: list[str], responses: list[str]) -> Verdicts:
        """Risk, raw verdict and status of each example."""
        raise NotImplementedError

    def score(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """Risk of each example, ``(n,)`` in [0, 1] (NaN: skip it, where the critic's failure policy says so)."""
        return self.judge(prompts, responses).risk


def plain_verdicts(risk: np.ndarray) -> Verdicts:
    """Verdicts of a critic that computes its risks and so cannot fail half-way."""
    risk = np.asarray(risk, dtype=float)
    return Verdicts(risk, risk.tolist(), [OK] * len(risk))


def check_pairs(prompts: list[str], responses: list[str]) -> None:
    """ValueError unless there is one response for each prompt, all of them text."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    for index, pair in enumerate(zip(prompts, responses)):
        if not all(isinstance(text, str) for text in pair):
            raise ValueError(f"example {index}: prompt and response must be text")


def check_apart(trained_with, evaluated_with) -> dict:
    """For a result: which critic trained, which measures, and whether they are the same, which warns.

    The same critic on both sides has the same blind spot on both: what it misses is learned and not counted.
    """
    trained, evaluated = (c if isinstance(c, str) else identity(c) for c in (trained_with, evaluated_with))
    if trained == evaluated:
        logger.warning("%s both trained the model and measures it: they share a blind spot, so use another to measure", trained)
    return {"trained_with": trained, "evaluated_with": evaluated, "same_critic": trained == evaluated}


def identity(critic) -> str:
    """What makes a critic itself: its kind and, where it has one, the model behind it."""
    model = getattr(critic, "model", None)
    model = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{critic.name}:{model}" if model else critic.name
