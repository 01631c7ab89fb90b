"""How fast, and in how much memory, are activations extracted? One prompt at a time against safelab's batches.

    python benchmarks/activations_speed.py [--prompts 256] [--rounds 3]

Paired: each round runs every arm in one process, in turn, on the same prompts of mixed length, all layers, last token.
`one_by_one` is the obvious loop: `output_hidden_states` in float32, the last token's states kept, the rest dropped. `all_kept` is the loop that keeps
every token of every layer, as published probing code does; it is run once, for its memory. `safelab` is the default, `safelab_fp32` the same without bfloat16.
Beside the speed: what the precision does to a probe, as AUROC on held-out pairs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np
import torch

from safelab.activations import extract_activations
from safelab.cli import _quiet
from safelab.datasets import load_prompts
from safelab.experiments import peak_memory, versions
from safelab.models import SAFE, decoder_layers, load_model, render_prompts
from safelab.probes import HarmProbe, default_layers, probe_prompts, scorecard
from safelab.probing import test_sets
from safelab.sources import write_atomic


def mixed_prompts(n: int, seed: int = 0) -> list[str]:
    """Held-out prompts as the library reads them: ours, everyday ones and two benchmarks', as many of each."""
    rng = np.random.default_rng(seed)
    pools = [rng.permutation(load_prompts(name, "eval")["prompt"]).tolist() for name in ("everyday", "harmful", "strongreject", "advbench")]
    return [prompt for of_each in zip(*pools) for prompt in of_each][:n]


@torch.no_grad()
def one_by_one(model, tokenizer, prompts: list[str], keep=slice(-1, None)) -> np.ndarray | list[np.ndarray]:
    """``(prompts, layers, width)``, or each prompt's tokens with ``keep=slice(None)``."""
    kept = []
    for ids in render_prompts(tokenizer, prompts):
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
        kept.append(torch.stack([h[0, keep] for h in states], dim=1).numpy())
    return kept


def measure(run) -> dict:
    """Seconds, and MB above what the process held before."""
    gc.collect()
    with suppress(OSError):  # what the allocator keeps of an earlier arm would hide what this one takes
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident()
    start = time.perf_counter()
    with peak_memory() as peak:
        result = run()
        seconds = time.perf_counter() - start
    del result
    return {"seconds": seconds, "extra_mb": max(0.0, peak[0] - before)}


def resident() -> float:
    """Resident memory now, in the unit of `peak_memory` (Linux)."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1000


def auroc_by_precision(model, tokenizer) -> dict:
    """The default probe's AUROC on twins never trained on, from activations in either precision."""
    train, y, groups = probe_prompts()
    test, labels = test_sets(["twins"])["twins"]
    found = {}
    for name, half in (("float32", False), ("bfloat16", True)):
        layers = default_layers(len(decoder_layers(model)))
        states = [extract_activations(model, tokenizer, p, layers=layers, half=half).concatenated() for p in (train, test)]
        found[name] = scorecard(labels, HarmProbe().fit(states[0], y, groups=groups).predict_proba(states[1])[:, 1])["auroc"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    _quiet()
    model, tokenizer = load_model(SAFE, device="cpu")
    prompts = mixed_prompts(args.prompts)
    arms = {
        "one_by_one": lambda: one_by_one(model, tokenizer, prompts),
        "safelab": lambda: extract_activations(model, tokenizer, prompts),
        "safelab_fp32": lambda: extract_activations(model, tokenizer, prompts, half=False),
    }
    for run in (one_by_one, extract_activations):
        run(model, tokenizer, prompts[:4])  # the first call pays for what later ones find ready
    rounds = []
    for number in range(args.rounds):
        rounds.append({name: measure(run) for name, run in arms.items()})
        print(f"round {number + 1}: " + ", ".join(f"{n} {r['seconds']:.1f} s, {r['extra_mb']:.0f} MB" for n, r in rounds[-1].items()), flush=True)
    all_kept = measure(lambda: one_by_one(model, tokenizer, prompts, slice(None)))
    half, exact = extract_activations(model, tokenizer, prompts).values, np.concatenate(one_by_one(model, tokenizer, prompts))
    middle = {name: {k: median(r[name][k] for r in rounds) for k in ("seconds", "extra_mb")} for name in arms} | {"all_kept": all_kept}
    lengths = [len(ids) for ids in render_prompts(tokenizer, prompts)]
    # the last of transformers' own states is after the final norm, ours before it: left out
    error = np.linalg.norm(half - exact, axis=2)[:, 1:-1] / np.linalg.norm(exact, axis=2)[:, 1:-1]
    result = {
        "ratios": {
            "throughput:safelab/one_by_one": median(r["one_by_one"]["seconds"] / r["safelab"]["seconds"] for r in rounds),
            "throughput:safelab_fp32/one_by_one": median(r["one_by_one"]["seconds"] / r["safelab_fp32"]["seconds"] for r in rounds),
            "memory:safelab/one_by_one": middle["safelab"]["extra_mb"] / max(middle["one_by_one"]["extra_mb"], 1e-9),
            "memory:safelab/all_kept": middle["safelab"]["extra_mb"] / max(all_kept["extra_mb"], 1e-9),
        },
        "medians": middle,
        "rounds": rounds,
        "relative_error_bfloat16": float(np.median(error)),
        "auroc_on_twins": auroc_by_precision(model, tokenizer),
        "prompts": len(prompts),
        "tokens": {"mean": float(np.mean(lengths)), "min": min(lengths), "max": max(lengths)},
        "threads": torch.get_num_threads(),
        "model": SAFE,
        "versions": versions(),
    }
    write_atomic(Path(__file__).with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps({k: result[k] for k in ("ratios", "auroc_on_twins", "relative_error_bfloat16")}, indent=1))


if __name__ == "__main__":
    main()
