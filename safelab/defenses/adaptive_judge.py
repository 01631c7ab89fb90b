"""Adaptive regularisation with a critic that reads the response, after the paper's judge-based critic."""

from __future__ import annotations

from safelab.defenses.adaptive import AdaptiveProbe


class AdaptiveJudge(AdaptiveProbe):
    """:class:`AdaptiveProbe` with s_i the probability that people would find the *response* harmful.

    So a harmless prompt with a harmful response is held, and a harmful prompt that is refused is learned. By default the
    critic is :class:`safelab.critics.ResponseClassifier` on the unaligned embedded model; ``critic`` may be any other,
    such as :class:`safelab.critics.JudgeCritic`.

    Source: arXiv 2602.17546, section 3.2.
    """

    name = "adaptive-judge"

    def default_critic(self, model, tokenizer):
        """The critic where none was given: it reads with the unaligned model, so neither argument is used."""
        return response_classifier()


def response_classifier():
    """:class:`safelab.critics.ResponseClassifier` on the unaligned embedded model."""
    from safelab.critics import ResponseClassifier
    from safelab.models import EMBEDDED, load_model

    return ResponseClassifier(*load_model(EMBEDDED))
