"""Adaptive regularisation with a critic that reads the response, after the paper's judge-based critic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelab.defenses.adaptive import AdaptiveProbe
from safelab.sources import cached_json

if TYPE_CHECKING:
    from datasets import Dataset


class AdaptiveJudge(AdaptiveProbe):
    """:class:`AdaptiveProbe` with s_i the probability that people would find the *response* harmful.

    So a harmless prompt with a harmful response is held, and a harmful prompt that is refused is learned. By default the
    critic is :class:`safelab.critics.ResponseClassifier` on the unaligned embedded model; ``critic`` may be any other,
    such as :class:`safelab.critics.JudgeCritic`.

    Judges are seldom quite sure that something is harmless, so the schedule is the one of the paper's code, ``"clamp"``
    (:class:`safelab.schedules.RiskSchedule`): a risk of up to a quarter, a judge's 2 of 5, holds no more than none.

    Source: arXiv 2602.17546, section 3.2, and its code.
    """

    name = "adaptive-judge"
    own_critic = "classifier"

    def __init__(self, beta_min: float = 0.0, beta_max: float = 1.0, granularity: str = "example", anchors: float = 0.4, shuffled: float = 0.0, critic=None, schedule: str = "clamp") -> None:
        super().__init__(beta_min, beta_max, granularity, anchors, shuffled, critic)
        self.schedule = schedule

    def settings(self) -> dict:
        return super().settings() | {"schedule_kind": self.schedule}

    def risks(self, model, tokenizer, data: Dataset) -> list[float]:
        """As of :class:`AdaptiveProbe`; the default critic's are kept, since it knows nothing of the model that is tuned."""
        if self.critic is not None:
            return super().risks(model, tokenizer, data)
        from safelab.critics.classifier import VERSION

        ask = super().risks
        return cached_json("risks", [VERSION, list(data["prompt"]), list(data["response"])], lambda: ask(model, tokenizer, data))

    def default_critic(self, model, tokenizer):
        """The critic where none was given: it reads with the unaligned model, so neither argument is used."""
        return response_classifier()


def response_classifier():
    """:class:`safelab.critics.ResponseClassifier` on the unaligned embedded model."""
    from safelab.critics import ResponseClassifier
    from safelab.models import EMBEDDED, load_model

    return ResponseClassifier(*load_model(EMBEDDED))
