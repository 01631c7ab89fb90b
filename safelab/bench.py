"""What a training step costs: ours beside TRL's, beside the leanest plain fine-tuning, and beside the public design.

All arms run in one process on the same batches, in turn, and their order rotates: what else the machine does hits all
alike, and ratios are taken step by step. Memory is the peak of a process of its own for each arm. The reference design
is written here for the comparison: a second model for the reference, logits of all positions, and the probe's forward
pass at every step.
"""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset

from safelab.losses import Head, head_loss, moments, token_kl, token_nll
from safelab.models import bf16_is_fast, frozen_in_half
from safelab.reference import CachedMoments, fill_moments, in_batches, response_logits, response_positions, response_spans

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

TARGETS = {
    "adaptive_cached/trl_sft": 0.75,
    "adaptive_cached/lean_sft": 1.10,
    "adaptive_cached/reference_design": 0.50,
    "memory:adaptive_cached/sft": 1.05,
    "head_extra_gb": 0.3,
    "cache_paid_back_epochs": 1.0,
}
"""The most that each may be."""
ARMS = ("trl_sft", "lean_sft", "sft", "adaptive_cached", "adaptive_adapter_off", "adaptive_model", "reference_design")
LEARNING_RATE = 2e-4


def bench_data(n: int, seed: int = 0) -> Dataset:
    """``n`` pairs of mixed lengths, responses of one to four of our refusals (20 to 150 tokens), with random risks."""
    from safelab.datasets import load_prompts, load_refusals

    rng = np.random.default_rng(seed)
    prompts, texts = list(load_prompts("everyday", "align")["prompt"]), load_refusals()
    rows = [
        {"prompt": prompts[rng.integers(len(prompts))], "response": " ".join(rng.choice(texts, rng.integers(1, 5))), "risk": float(rng.random())}
        for _ in range(n)
    ]
    return Dataset.from_list(rows)


# ------------------------------------------------------------------------------------------- the arms


def make_arms(model, tokenizer, data: Dataset, output: str, *, batch_size: int = 8, only: tuple[str, ...] | None = None) -> dict[str, Callable]:
    """Arm -> ``step(batch number)``: forward, backward, clipping and AdamW on LoRA weights, under bfloat16 autocast where it pays (:func:`safelab.models.bf16_is_fast`).

    Each arm has modules and an adapter of its own; the frozen weights are shared.
    """
    from safelab.training import PairCollator, tokenize_pairs

    rows = list(tokenize_pairs(tokenizer, data))
    batches = [rows[i : i + batch_size] for i in range(0, len(rows) - batch_size + 1, batch_size)]
    collate = PairCollator(tokenizer.pad_token_id)
    make = {
        "trl_sft": partial(_trl_step, tokenizer=tokenizer, rows=rows, output=output),
        "lean_sft": _lean_step,
        "sft": partial(_our_step, tokenizer=tokenizer, data=data, output=output, beta_min=0.0, beta_max=0.0),
        **{
            f"adaptive_{kind.replace('-', '_')}": partial(_our_step, tokenizer=tokenizer, data=data, output=output, reference=kind)
            for kind in ("cached", "adapter-off", "model")
        },
        "reference_design": _reference_step,
    }

    def arm(name: str):
        step = make[name](_twin(model), collate)
        return lambda number: step(batches[number % len(batches)])

    return {name: arm(name) for name in make if only is None or name in only}


def _twin(model):
    """Modules of its own around the same weights."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(w): w for w in weights})


def _update(model, optimizer) -> None:
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _settings(model, output: str) -> dict:
    return dict(output_dir=output, bf16=bf16_is_fast(model.device.type), gradient_checkpointing=False, use_cpu=model.device.type == "cpu", learning_rate=LEARNING_RATE,
                report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no")  # fmt: skip


def _trainer_step(trainer, examples: Callable):
    """A trainer's own step, taken by hand so that arms can take turns."""
    held = ExitStack()  # as long as the step lives
    held.enter_context(trainer.quick_steps() if hasattr(trainer, "quick_steps") else nullcontext())
    model = trainer.accelerator.prepare_model(trainer.model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    trainer.current_gradient_accumulation_steps = 1

    def step(rows: list[dict]) -> None:
        batch = {k: v.to(trainer.model.device) for k, v in examples(rows).items()}
        (batch,), items = trainer.get_batch_samples(iter([batch]), 1, trainer.model.device)
        trainer.training_step(model, batch, items)
        _update(model, optimizer)

    step.held = held
    return step


def _our_step(model, collate, *, tokenizer, data, output, **settings):
    from safelab.training import AdaptiveSFTConfig, AdaptiveSFTTrainer, lora_config

    reference = _twin(model) if settings.get("reference") == "model" else None
    args = AdaptiveSFTConfig(**_settings(model, output), **settings)
    trainer = AdaptiveSFTTrainer(model, args, data, processing_class=tokenizer, peft_config=lora_config(), reference_model=reference)
    return _trainer_step(trainer, collate)


def _trl_step(model, collate, *, tokenizer, rows, output):
    from trl import SFTConfig, SFTTrainer

    from safelab.training import lora_config

    data = Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
    trainer = SFTTrainer(model, SFTConfig(**_settings(model, output)), train_dataset=data, processing_class=tokenizer, peft_config=lora_config())
    return _trainer_step(trainer, lambda batch: trainer.data_collator([{k: row[k] for k in ("input_ids", "labels")} for row in batch]))


def _by_hand(model, collate, loss: Callable):
    """A bare training step around ``loss(model, inputs, mask, targets, risk)``."""
    from peft import get_peft_model

    from safelab.training import lora_config

    model = get_peft_model(model, lora_config()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)

    def step(rows: list[dict]) -> None:
        batch = {k: v.to(model.device) for k, v in collate(rows).items()}
        mask, targets = response_positions(batch["labels"])
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16_is_fast(model.device.type)):
            value = loss(model, {k: batch[k] for k in ("input_ids", "attention_mask")}, mask, targets, batch["risk"])
        value.backward()
        _update(model, optimizer)

    return step


def _lean_step(model, collate):
    """Plain fine-tuning with nothing that could be left out, and the head on response tokens only."""
    return _by_hand(model, collate, lambda model, inputs, mask, targets, _: token_nll(response_logits(model, inputs, mask), targets).mean())


def _reference_step(model, collate):
    """The public design. Its second model is a true copy: there, the weights are not shared."""
    reference = copy.deepcopy(model).eval()

    def loss(model, inputs, mask, targets, risk):
        with torch.no_grad():
            reference(**inputs, output_hidden_states=True, use_cache=False).hidden_states  # noqa: B018 - what the probe reads
            theirs = reference(**inputs, use_cache=False).logits
        logits = model(**inputs, use_cache=False).logits
        beta = (0.1 + 0.8 * risk)[mask.nonzero()[:, 0]]
        return ((1 - beta) * token_nll(logits[mask], targets) + beta * token_kl(theirs[mask], logits[mask])).mean()

    return _by_hand(model, collate, loss)


# ---------------------------------------------------------------------------------------- measurements


def time_arms(arms: dict[str, Callable], steps: int, *, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each step by arm: the same batch for all in turn, the first to go another one each time."""
    names, seconds = list(arms), {name: [] for name in arms}
    for number in range(warm_up + steps):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            started = time.perf_counter()
            arms[name](number)
            _synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
        logger.info("step %d of %d: %s", number + 1, warm_up + steps, ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items() if s))
    return seconds


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def spread(values) -> dict[str, float]:
    """Median and quartiles."""
    lo, median, hi = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": round(float(median), 4), "q1": round(float(lo), 4), "q3": round(float(hi), 4), "n": len(values)}


def arm_memory(name: str, *, model: str, steps: int = 4, seed: int = 0) -> int:
    """Peak memory in MB of a fresh process that trains under one arm."""
    command = [sys.executable, "-m", "safelab.bench", name, model, str(steps), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def synthetic_head(n: int = 1024, width: int = 896, vocabulary: int = 151_936, *, seed: int = 0, device: str = "cpu") -> dict:
    """Time and extra memory of NLL + KL, forward and backward, at the output head of a larger model in float32."""
    from safelab.experiments import peak_memory

    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.05).to(device)
    hidden, theirs = (torch.randn(n, width, generator=generator).to(device) for _ in range(2))
    targets, half = torch.randint(vocabulary, (n,), generator=generator).to(device), torch.full((n,), 0.5, device=device)
    known = moments(theirs, weight, None)
    result = {"tokens": n, "width": width, "vocabulary": vocabulary}
    for name, reference in (("moments", known), ("reference_states", Head(theirs, weight))):
        h = hidden.clone().requires_grad_()
        _synchronize()
        before, started = _held_mb(device), time.perf_counter()
        with peak_memory(device) as peak:
            head_loss(h, weight, None, targets, half, half, reference)[0].backward()
            _synchronize()
        result[name] = {"seconds": round(time.perf_counter() - started, 2), "extra_gb": round((peak[0] - before) / 1000, 3)}
    return result


def _held_mb(device: str = "cpu") -> float:
    if device != "cpu":
        return torch.accelerator.memory_allocated() / 1e6
    with open("/proc/self/status") as file:
        return int(file.read().split("VmRSS:")[1].split()[0]) / 1000


def cache_cost(model, tokenizer, data: Dataset) -> float:
    """Seconds an example that the one pass for the cached reference takes."""
    from safelab.training import PairCollator, tokenize_pairs

    rows = list(tokenize_pairs(tokenizer, data))
    collate = PairCollator(tokenizer.pad_token_id)
    spans, tokens = response_spans(rows)
    values = np.empty((tokens, model.get_output_embeddings().weight.shape[1] + 1), np.float32)
    batches = ({k: v.to(model.device) for k, v in collate(batch).items()} for batch in in_batches(rows, model.device.type))
    half = bf16_is_fast(model.device.type)
    started = time.perf_counter()
    with frozen_in_half(model) if half else nullcontext():
        fill_moments(model, batches, spans, values, autocast=partial(torch.autocast, model.device.type, torch.bfloat16, enabled=half))
    return (time.perf_counter() - started) / len(rows)


def lookup_cost(examples: int, *, width: int = 576, tokens: int = 64, batch_size: int = 8) -> float:
    """Seconds to look up the moments of a batch among those of so many examples."""
    with tempfile.TemporaryFile() as file:
        values = np.memmap(file, np.float32, "w+", shape=(examples * tokens, width + 1))
        cache = CachedMoments(values, {i: slice(i * tokens, (i + 1) * tokens) for i in range(examples)})
        mask, rng = torch.ones(batch_size, tokens, dtype=torch.bool), np.random.default_rng(0)
        seconds = []
        for _ in range(50):
            indices = rng.integers(examples, size=batch_size).tolist()
            started = time.perf_counter()
            cache.moments(indices, mask)
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def run_bench(*, steps: int = 20, quick: bool = False, seed: int = 0, model: str | None = None) -> dict:
    """All of it -> ``ratios``, ``medians`` (seconds a step), ``spread``, ``memory_mb``, ``head``, ``cache``, ``targets``, ``met``.

    ``met`` tells which ratio is within its target; a quick run is too short to judge by.
    """
    from safelab.experiments import precision, versions
    from safelab.models import SAFE, load_model

    started = time.monotonic()
    steps, model = (3 if quick else steps), model or SAFE
    net, tokenizer = load_model(model)
    net.requires_grad_(False)
    data = bench_data(8 * (steps + 2), seed)
    with ThreadPoolExecutor(1 if net.device.type == "cpu" else len(ARMS)) as pool:  # a GPU counts the memory of each process by itself
        memory = dict(zip(ARMS, pool.map(partial(arm_memory, model=model, seed=seed), ARMS)))
    with tempfile.TemporaryDirectory() as output:
        seconds = time_arms(make_arms(net, tokenizer, data, output), steps)
    per_example = cache_cost(net, tokenizer, data)
    medians = {name: spread(s)["median"] for name, s in seconds.items()}
    cached = np.array(seconds["adaptive_cached"])
    paired = {f"adaptive_cached/{name}": spread(cached / s) for name, s in seconds.items() if name != "adaptive_cached"}
    ratios = {name: s["median"] for name, s in paired.items()}
    ratios["memory:adaptive_cached/sft"] = memory["adaptive_cached"] / memory["lean_sft"]  # the leaner of the two plain ones
    ratios |= {f"memory:adaptive_cached/{name}": memory["adaptive_cached"] / memory[name] for name in ("trl_sft", "reference_design")}
    ratios = {name: round(r, 3) for name, r in ratios.items()}
    head = synthetic_head(*((64, 64, 1000) if quick else ()), seed=seed, device=net.device.type)
    saved = medians["adaptive_adapter_off"] - medians["adaptive_cached"]  # what a step costs that makes the reference anew
    paid_back = round(8 * per_example / saved, 2) if saved > 0 else None
    found = ratios | {"head_extra_gb": head["moments"]["extra_gb"], "cache_paid_back_epochs": np.inf if paid_back is None else paid_back}
    return {
        "ratios": ratios,
        "medians": medians,
        "spread": {**{name: spread(s) for name, s in seconds.items()}, **paired},
        "memory_mb": memory,
        "head": head,
        "cache": {
            "seconds_per_example": round(per_example, 4),
            "paid_back_after_epochs": paid_back,
            "lookup_ms": {str(n): round(1000 * lookup_cost(n), 3) for n in (100, 10_000)},
        },
        "targets": TARGETS,
        "met": {name: bool(found[name] <= most) for name, most in TARGETS.items()},
        "model": model,
        "steps": steps,
        "batch": {"size": 8, "tokens": _tokens(tokenizer, data)},
        "device": torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "seed": seed,
        "precision": precision(net.device.type),
        "versions": versions(),
        "elapsed_seconds": round(time.monotonic() - started, 1),
        "command": "safelab bench" + (" --quick" if quick else f" --steps {steps}") + f" --seed {seed}",
    }


def _tokens(tokenizer, data: Dataset) -> dict:
    from safelab.training import tokenize_pairs

    rows = tokenize_pairs(tokenizer, data)
    return {"text": spread([len(row["input_ids"]) for row in rows]), "response": spread([sum(x != -100 for x in row["labels"]) for row in rows])}


def bench_table(result: dict) -> str:
    """The result as a Markdown table."""
    lines = ["| arm | seconds a step, median | quartiles | adaptive, cached / this: median of paired ratios, quartiles | peak MB |", "|---|---|---|---|---|"]
    for name, median in result["medians"].items():
        s, paired, memory = result["spread"][name], result["spread"].get(f"adaptive_cached/{name}"), result["memory_mb"].get(name, "")
        ratio = f"{paired['median']:.2f}, {paired['q1']:.2f} to {paired['q3']:.2f}" if paired else ""
        lines.append(f"| {name} | {median:.3f} | {s['q1']:.3f} to {s['q3']:.3f} | {ratio} | {memory} |")
    cache, head = result["cache"], result["head"]
    lines.append(f"\nthe cached reference: {1000 * cache['seconds_per_example']:.0f} ms an example once, paid back after {cache['paid_back_after_epochs']} epochs beside adapter-off")
    lines.append(
        f"a head of {head['vocabulary']:,} x {head['width']} on {head['tokens']} tokens: "
        + ", ".join(f"{k.replace('_', ' ')} {head[k]['seconds']:.1f} s and {head[k]['extra_gb']:.2f} GB" for k in ("moments", "reference_states"))
    )
    lines += [f"{'met' if ok else 'NOT met'}: {name} <= {result['targets'][name]}" for name, ok in result["met"].items()]
    return "\n".join(lines)


def _one_arm(name: str, model: str, steps: int, seed: int) -> int:
    """Peak memory in MB of this process, from its start on."""
    from safelab.experiments import peak_memory
    from safelab.models import load_model

    with tempfile.TemporaryDirectory() as output, peak_memory("cuda" if torch.cuda.is_available() else "cpu") as peak:
        net, tokenizer = load_model(model)
        net.requires_grad_(False)
        step = make_arms(net, tokenizer, bench_data(8 * steps, seed), output, only=(name,))[name]
        for number in range(steps):
            step(number)
    return int(peak[0])


if __name__ == "__main__":
    arm, base, steps, seed = sys.argv[1:]
    logging.disable(logging.WARNING)
    print(json.dumps(_one_arm(arm, base, int(steps), int(seed))))
