"""Critics: anything that gives each (prompt, response) a risk in [0, 1]. One file an idea."""

from safelab.critics.base import Critic, SafetyCritic, Verdicts
from safelab.critics.classifier import ResponseClassifier
from safelab.critics.compose import Cascade, KnownRisks, MaxCritic, MeanCritic
from safelab.critics.guard import GuardCritic
from safelab.critics.judge import JudgeCritic, JudgeError
from safelab.critics.local import LocalJudge
from safelab.critics.patterns import PatternCritic
from safelab.critics.probe import ProbeCritic, train_probe_critic

__all__ = [
    "Cascade", "Critic", "GuardCritic", "JudgeCritic", "JudgeError", "KnownRisks", "LocalJudge", "MaxCritic", "MeanCritic",
    "PatternCritic", "ProbeCritic", "ResponseClassifier", "SafetyCritic", "Verdicts", "train_probe_critic",
]  # fmt: skip
