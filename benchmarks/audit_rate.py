"""How many examples a second does `safelab audit` read with its default critic, on one core?

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/audit_rate.py

The data are the task of the demo with 10 % harmful examples. The labelled answers that the critic learns from are read
once a machine, before the clock runs.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch

from safelab.attacks import mixture
from safelab.cli import _quiet
from safelab.critics import ResponseClassifier
from safelab.critics.audit import audit
from safelab.experiments import versions
from safelab.models import EMBEDDED, load_model
from safelab.sources import write_atomic

EXAMPLES = 640


def main() -> None:
    _quiet()
    critic = ResponseClassifier(*load_model(EMBEDDED)).fit()
    rows = [{"prompt": r["prompt"], "response": r["response"]} for r in mixture(0.1, EXAMPLES, 0)]
    with tempfile.TemporaryDirectory() as folder:
        started, used = time.monotonic(), time.process_time()
        result = audit(rows, critic, folder)
        wall, cpu = time.monotonic() - started, time.process_time() - used
    found = {
        "examples": EXAMPLES,
        "mean_characters": round(sum(len(r["prompt"]) + len(r["response"]) for r in rows) / EXAMPLES),
        "threads": torch.get_num_threads(),
        "examples_per_second": round(EXAMPLES / wall, 2),
        "examples_per_cpu_second": round(EXAMPLES / cpu, 2),
        "median_batch": result["examples_per_second"],
        "risky": result["risky"],
        "versions": versions(),
    }
    write_atomic(Path(__file__).with_suffix(".json"), (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
