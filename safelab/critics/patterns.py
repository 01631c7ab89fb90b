"""The plainest critics: what refusal patterns and a bag of words see."""

from __future__ import annotations

import numpy as np

from safelab.critics.base import Critic, Verdicts, check_pairs, plain_verdicts
from safelab.evaluation import is_refusal


class PatternCritic(Critic):
    """Risk 0 where the response opens with a refusal (:func:`safelab.evaluation.is_refusal`), else 1.

    It knows nothing of harm: a benign answer is as risky to it as a harmful one.
    """

    name = "patterns"

    def judge(self, prompts: list[str], responses: list[str]) -> Verdicts:
        check_pairs(prompts, responses)
        return plain_verdicts(np.array([0.0 if is_refusal(response) else 1.0 for response in responses]))
