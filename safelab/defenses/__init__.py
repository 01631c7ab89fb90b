"""Defences, one file each, one interface (:class:`safelab.defenses.base.Defense`)."""

from safelab.defenses.adaptive import AdaptiveProbe
from safelab.defenses.adaptive_judge import AdaptiveJudge
from safelab.defenses.antidote import Antidote
from safelab.defenses.base import Defense
from safelab.defenses.booster import Booster
from safelab.defenses.constant_kl import ConstantKL
from safelab.defenses.constrained_sft import ConstrainedSFT
from safelab.defenses.lisa import Lisa
from safelab.defenses.safelora import SafeLoRA
from safelab.defenses.safety_mixing import SafetyMixing
from safelab.defenses.sft import SFT
from safelab.defenses.star_dss import StarDSS
from safelab.defenses.vaccine import Vaccine

DEFENSES: dict[str, type[Defense]] = {
    d.name: d
    for d in (SFT, ConstantKL, ConstrainedSFT, SafetyMixing, Lisa, Vaccine, Booster, Antidote, SafeLoRA, StarDSS, AdaptiveProbe, AdaptiveJudge)
}

__all__ = ["DEFENSES", "Defense", *sorted(d.__name__ for d in DEFENSES.values())]
