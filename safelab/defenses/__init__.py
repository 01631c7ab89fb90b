"""Defences, one file each, one interface (:class:`safelab.defenses.base.Defense`)."""

from safelab.defenses.adaptive import AdaptiveProbe
from safelab.defenses.base import Defense
from safelab.defenses.constant_kl import ConstantKL
from safelab.defenses.sft import SFT

DEFENSES: dict[str, type[Defense]] = {d.name: d for d in (SFT, ConstantKL, AdaptiveProbe)}

__all__ = ["DEFENSES", "AdaptiveProbe", "ConstantKL", "Defense", "SFT"]
