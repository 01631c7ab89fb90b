"""What a critic is, and what it hands back: a risk, what it said, and whether it could say anything at all."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
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
    """A critic of your own whose verdicts may change under the same name has a ``version`` too (:func:`identity`): runs that are kept go by it."""

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


def verdicts_of(critic, prompts: list[str], responses: list[str]) -> Verdicts:
    """The verdicts of any critic, also of one that has only a ``score``."""
    return critic.judge(prompts, responses) if hasattr(critic, "judge") else plain_verdicts(critic.score(prompts, responses))


def held_out(critic, labels: str, prompts, responses, score, groups, folds) -> tuple[Verdicts, list[float] | None]:
    """Verdicts on labelled examples; of a critic that learns, each by what it had learned on the other folds.

    The thresholds are those that it chose in training, one a fold; None where it leaves that to the caller.
    """
    if hasattr(critic, "cross_judge"):
        return critic.cross_judge(labels, prompts, responses, score, groups, folds)
    return critic.judge(prompts, responses), None


def check_pairs(prompts: list[str], responses: list[str]) -> None:
    """ValueError unless there is one response for each prompt, all of them text."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    for index, pair in enumerate(zip(prompts, responses)):
        if not all(isinstance(text, str) for text in pair):
            raise ValueError(f"example {index}: prompt and response must be text")


def check_apart(trained_with, evaluated_with) -> dict:
    """For a result: which critic trained, which measures, and whether they are the same, which warns.

    The same critic on both sides has the same blind spot on both: what it misses is learned and not counted. Composed
    critics are the same where they share one. Each is a critic, what :func:`members` says of it, or None for no critic.
    """
    trained, evaluated = (c if isinstance(c, str | None) else members(c) for c in (trained_with, evaluated_with))
    pairs = [(a, b) for a in (trained or "").split(" + ") for b in (evaluated or "").split(" + ")]
    shared = [b for a, b in pairs if a and a in (b, b.split(":")[0]) or b and b == a.split(":")[0]]  # without a model: any
    if shared:
        logger.warning("%s both trained the model and measures it: they share a blind spot, so use another to measure", ", ".join(shared))
    return {"trained_with": trained, "evaluated_with": evaluated, "same_critic": bool(shared)}


def members(critic) -> str:
    """The kind of a critic and its model's name, such as ``"judge:gpt"``; of a composed one each part's, with `` + `` between."""
    if parts := getattr(critic, "critics", ()):
        return " + ".join(members(part) for part in parts)
    model = getattr(critic, "model", None)
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{critic.name}:{Path(name).name}" if name else critic.name


def identity(critic) -> str:
    """What a critic's verdicts depend on, beside the texts: its kind, model and settings, and those of its parts."""
    model = getattr(critic, "model", None)
    settings = [getattr(critic, name) for name in ("version", "labels", "helpers", "kind", "rubric", "unsure") if hasattr(critic, name)]
    about = [critic.name, fingerprint(model) if hasattr(model, "state_dict") else model, settings, [identity(part) for part in getattr(critic, "critics", ())]]
    return repr(about)


def fingerprint(model) -> str:
    """A hash of the beginnings of all weights: cheap, and another model has another."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:20]
