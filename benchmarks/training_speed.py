"""What might make a training step faster, and does a step stay as fast when the data grow?

    python benchmarks/training_speed.py [attention] [growth] [sorted] [joined] [inference] [head] [--steps 10] [--rounds 4]

attention  a step, and one layer by length, with PyTorch's own attention and with a backward pass for short texts
growth     the same batches out of 100, 1,000 and 10,000 examples, their cached reference in a mapped file of that many
sorted     64 examples in eight batches as they come, or sorted by length
joined     the adapter-off reference in a pass of its own, or policy and reference in one pass of twice the rows
inference  a forward pass of the start, tuned and merged, tuned with its adapter beside it
head       time and memory of the loss at a large output head, for all rows at once and in groups

The safe embedded model, batches of 8 of mixed lengths, LoRA under bfloat16 autocast. Arms take turns in one process, so ratios are paired.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset

from safelab.attention import NAME, ShortAttention
from safelab.bench import _by_hand, _held_mb, _our_step, _settings, _trainer_step, _twin, bench_data, spread, time_arms
from safelab.cli import _quiet
from safelab.experiments import peak_memory, versions
from safelab.losses import Head, head_loss, moments
from safelab.models import SAFE, load_model
from safelab.reference import AdapterOff, CachedMoments, output_head, response_states
from safelab.sources import write_atomic
from safelab.training import AdaptiveSFTConfig, AdaptiveSFTTrainer, PairCollator, lora_config, tokenize_pairs


def compared(seconds: dict[str, list[float]], base: str) -> dict:
    """Medians and quartiles of each arm, and of its paired ratio to ``base``."""
    against = {f"{name}/{base}": spread(np.array(s) / np.array(seconds[base])) for name, s in seconds.items() if name != base}
    return {"seconds": {name: spread(s) for name, s in seconds.items()}, "ratios": against}


def attention(model, tokenizer, output: str, *, steps: int, lengths=(64, 128, 180, 192, 224, 256, 320)) -> dict:
    """Steps with each attention; and milliseconds of one layer's, forward and backward, of 8 texts with 9 heads of width 64 in bfloat16."""
    data = bench_data(8 * (steps + 2))
    rows, collate, arms = list(tokenize_pairs(tokenizer, data)), PairCollator(tokenizer.pad_token_id), {}
    for name in ("sdpa", NAME, "eager"):
        net = _twin(model)
        step = _our_step(net, collate, tokenizer=tokenizer, data=data, output=output, reference="cached")
        net.set_attn_implementation(name)
        arms[name] = lambda number, step=step: step(rows[8 * number : 8 * number + 8])
    layer = {}
    for length in lengths:
        query, key, value = (torch.randn(8, length, 9, 64).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3))
        grad = torch.randn(8, length, 9, 64).bfloat16().transpose(1, 2)
        mask = torch.ones(8, 1, length, length, dtype=torch.bool).tril()
        ways = {"sdpa": partial(F.scaled_dot_product_attention, query, key, value, mask), NAME: partial(ShortAttention.apply, query, key, value, mask, 64**-0.5)}
        taken = time_arms({name: lambda _, way=way, grad=grad: way().backward(grad) for name, way in ways.items()}, steps)
        layer[str(length)] = {name: round(1000 * spread(s)["median"], 1) for name, s in taken.items()}
    return compared(time_arms(arms, steps), "sdpa") | {"one layer, ms": layer}


def growth(model, tokenizer, output: str, *, steps: int, sizes=(100, 1_000, 10_000)) -> dict:
    """Copies of 100 examples: what each arm computes is the same, where it finds it is not."""
    base = bench_data(sizes[0])
    made = AdaptiveSFTTrainer(
        _twin(model), AdaptiveSFTConfig(**_settings(model, output), reference="cached"), base, processing_class=tokenizer, peft_config=lora_config()
    ).reference
    tokens, rng, arms = len(made.values), np.random.default_rng(0), {}
    for size in sizes:
        copies = size // len(base)
        data = Dataset.from_dict({name: column * copies for name, column in base.to_dict().items()})
        args = AdaptiveSFTConfig(**_settings(model, output), reference="adapter-off")
        trainer = AdaptiveSFTTrainer(_twin(model), args, data, processing_class=tokenizer, peft_config=lora_config())
        values = np.memmap(Path(output) / f"{size}", np.float32, "w+", shape=(copies * tokens, made.values.shape[1]))
        for c in range(copies):
            values[c * tokens : (c + 1) * tokens] = made.values
        spans = {c * len(base) + i: slice(c * tokens + s.start, c * tokens + s.stop) for c in range(copies) for i, s in made.spans.items()}
        trainer.reference = CachedMoments(values, spans)
        places = rng.integers(copies, size=(steps + 2, 8)) * len(base)
        arms[f"{size:,}"] = partial(_from_data_set, trainer, _trainer_step(trainer, lambda rows, trainer=trainer: trainer.data_collator(rows)), places)
    return compared(time_arms(arms, steps), f"{sizes[0]:,}")


def _from_data_set(trainer, step, places: np.ndarray, number: int) -> None:
    chosen = [(number * 8 + i) % 100 + int(place) for i, place in enumerate(places[number])]
    step([trainer.train_dataset[i] for i in chosen])


def by_length(model, tokenizer, output: str, *, rounds: int) -> dict:
    """A round is the same 64 examples in both arms: all that differs is which of them are padded to one length."""
    data = bench_data(64)
    collate = PairCollator(tokenizer.pad_token_id)
    rows = list(tokenize_pairs(tokenizer, data))
    orders = {"as they come": rows, "sorted": sorted(rows, key=lambda row: len(row["input_ids"]))}
    step = _our_step(_twin(model), collate, tokenizer=tokenizer, data=data, output=output, reference="cached")

    def pass_over(order: list[dict], _: int) -> None:
        for start in range(0, len(order), 8):
            step(order[start : start + 8])

    padded = {name: sum(8 * max(len(row["input_ids"]) for row in order[i : i + 8]) for i in range(0, 64, 8)) for name, order in orders.items()}
    found = compared(time_arms({name: partial(pass_over, order) for name, order in orders.items()}, rounds, warm_up=1), "as they come")
    return found | {"tokens with padding": padded}


def joined(model, tokenizer, *, steps: int) -> dict:
    """Forward, backward and update; the loss is ours in both arms."""
    rows = list(tokenize_pairs(tokenizer, bench_data(8 * (steps + 2))))
    collate = PairCollator(tokenizer.pad_token_id)

    def loss(net, inputs, mask, targets, risk, *, one_pass: bool):
        head, beta = output_head(net), (0.1 + 0.8 * risk)[mask.nonzero()[:, 0]]
        if one_pass:
            both = response_states(net, {k: torch.cat([v, v]) for k, v in inputs.items()}, torch.cat([mask, mask]))
            hidden, theirs = both[: len(targets)], both[len(targets) :].detach()
        else:
            with AdapterOff().model(net) as other:
                theirs = response_states(other, inputs, mask)
            hidden = response_states(net, inputs, mask)
        return head_loss(hidden, head.weight, None, targets, 1 - beta, beta, Head(theirs, head.weight))[0] / len(targets)

    def adapter_on_the_first_half(_, __, out: torch.Tensor) -> torch.Tensor:
        return torch.cat([out[: len(out) // 2], torch.zeros_like(out[len(out) // 2 :])])

    nets = {"two passes": _twin(model), "one pass": _twin(model)}
    steps_of = {name: _by_hand(net, collate, partial(loss, one_pass=name == "one pass")) for name, net in nets.items()}
    for name, module in nets["one pass"].named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(adapter_on_the_first_half)
    arms = {name: lambda number, step=step: step(rows[8 * number : 8 * number + 8]) for name, step in steps_of.items()}
    return compared(time_arms(arms, steps), "two passes")


@torch.no_grad()
def inference(model, tokenizer, *, steps: int) -> dict:
    """The forward pass over two examples, from which every answer starts, without autocast."""
    from peft import get_peft_model

    def tuned():
        net = get_peft_model(copy.deepcopy(model), lora_config())
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
        return net

    nets = {"start": model, "merged": tuned().merge_and_unload(), "adapter": tuned()}
    batch = PairCollator(tokenizer.pad_token_id)(list(tokenize_pairs(tokenizer, bench_data(2))))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}

    def forward(net, _: int) -> None:
        net(**inputs, use_cache=False)

    count = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    return compared(time_arms({name: partial(forward, net.eval()) for name, net in nets.items()}, steps), "start") | {"parameters": count}


def at_the_head(n: int = 1024, width: int = 896, vocabulary: int = 151_936) -> dict:
    """NLL + KL, forward and backward, in float32: seconds and GB on top of what is there before."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=generator) * 0.05
    hidden, theirs = (torch.randn(n, width, generator=generator) for _ in range(2))
    targets, half = torch.randint(vocabulary, (n,), generator=generator), torch.full((n,), 0.5)
    known = moments(theirs, weight, None)
    result = {}
    for memory in (64, 128, 256, 1024, 4096):
        for name, reference in (("moments", known), ("reference states", Head(theirs, weight))):
            h = hidden.clone().requires_grad_()
            before, started = _held_mb(), time.perf_counter()
            with peak_memory() as peak:
                head_loss(h, weight, None, targets, half, half, reference, memory=memory)[0].backward()
            result[f"{name}, loss_memory {memory}"] = {"seconds": round(time.perf_counter() - started, 2), "extra_gb": round((peak[0] - before) / 1000, 3)}
    return result


def main() -> None:
    names = ("attention", "growth", "sorted", "joined", "inference", "head")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=names, choices=names)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    _quiet()
    file = Path(__file__).with_suffix(".json")
    result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if set(args.what) - {"head"}:
        model, tokenizer = load_model(SAFE)
        model.requires_grad_(False)
    with tempfile.TemporaryDirectory() as output:
        for what in args.what:
            about = {"threads": torch.get_num_threads(), "versions": versions()}
            if what == "attention":
                found = attention(model, tokenizer, output, steps=args.steps)
            elif what == "growth":
                found = growth(model, tokenizer, output, steps=args.steps)
            elif what == "sorted":
                found = by_length(model, tokenizer, output, rounds=args.rounds)
            elif what == "joined":
                found = joined(model, tokenizer, steps=args.steps)
            elif what == "inference":
                found = inference(model, tokenizer, steps=args.steps)
            else:
                found = at_the_head()
            result[what] = found | about
            print(json.dumps({what: found}, indent=1), flush=True)
            write_atomic(file, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
