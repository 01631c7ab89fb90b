"""One small cell of a grid on the embedded model, from the attack's data to its row."""

import math

from safelab.attacks import ATTACKS
from safelab.experiments import QUICK_SUITE, Cell, run_named, tidy
from safelab.models import SAFE


def test_a_wrapped_attack_against_a_token_level_defence():
    row = run_named(Cell("identity-shift", "constrained-sft", 0), model=SAFE, quick=True, force=True)
    assert row["wrapper"]["system"] == ATTACKS["identity-shift"].wrapper.system
    assert {k: len(flags) for k, flags in row["flags"].items()} == {
        "asr": QUICK_SUITE.harmful,
        "asr_strongreject": QUICK_SUITE.strongreject,
        "asr_plain": QUICK_SUITE.harmful,
        "asr_strongreject_plain": QUICK_SUITE.strongreject,
        "over_refusal": QUICK_SUITE.benign,
        "utility": QUICK_SUITE.task,
        "utility_balanced": QUICK_SUITE.task,
    }
    assert [h["step"] for h in row["history"]] == [1, 2] and all(math.isfinite(h["nll"]) for h in row["history"])
    assert tidy(row)["step_seconds"] > 0 and row["peak_memory_mb"] > 500
