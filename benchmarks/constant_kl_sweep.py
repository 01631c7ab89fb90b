"""Which fixed beta serves constant-kl best? DEMO_BETA is the result's.

    python benchmarks/constant_kl_sweep.py

Every beta gets the demo's data, budget and evaluation, seed 0. Best: the highest task accuracy less attack success rate.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safelab.attacks import mixture
from safelab.cli import _quiet
from safelab.defenses import ConstantKL
from safelab.experiments import DEMO_EXAMPLES, Budget, Suite, run_cell, summarise, versions, with_time_left
from safelab.models import SAFE
from safelab.sources import write_atomic

BETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
SEED = 0


def main() -> None:
    _quiet()
    rows = []
    for beta, left in with_time_left(list(BETAS)):
        print(f"beta {beta}{left}", flush=True)
        row = run_cell("mixture-10", mixture(0.1, DEMO_EXAMPLES, SEED), ConstantKL(beta), SEED, model=SAFE, budget=Budget(), suite=Suite())
        rows.append({"beta": beta} | {k: v for k, v in summarise("constant-kl", [row]).items() if k not in ("by_seed", "arm")})
        print({k: round(rows[-1][k]["mean"], 3) for k in ("asr", "asr_strongreject", "over_refusal", "utility")}, flush=True)
    best = max(rows, key=lambda r: r["utility"]["mean"] - r["asr"]["mean"])["beta"]
    result = {"best": best, "rows": rows, "seed": SEED, "budget": asdict(Budget()), "suite": asdict(Suite()), "versions": versions()}
    write_atomic(Path(__file__).with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
    print("best beta:", best)


if __name__ == "__main__":
    main()
