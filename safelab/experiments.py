"""Attack x defence x seed under one budget, resumable, one row a run.

A finished run is one JSON file in the cache, named by a hash of everything that determines it; asked for again,
it is read instead of run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from safelab.models import bf16_is_fast
from safelab.sources import cache_dir, data_dir, write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from datasets import Dataset

    from safelab.attacks import Attack, Wrapper
    from safelab.defenses import Defense
    from safelab.evaluation import Rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """What every arm gets: the same steps on the same data."""

    learning_rate: float = 2e-3
    epochs: int = 1
    batch_size: int = 8
    rank: int = 16
    mean_over: str = "example"  # over tokens, a task of one-word answers is drowned by the long harmful ones

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.epochs < 1 or self.batch_size < 1 or self.rank < 1:
            raise ValueError(f"a budget's numbers must be positive: {self}")


MEASURED_BY = "patterns"
"""The critic behind a suite's attack success rate: :func:`safelab.evaluation.is_refusal`, which is PatternCritic's."""


@dataclass(frozen=True)
class Suite:
    """How many held-out cases judge a model (None: all there are); always the same ones."""

    harmful: int | None = 100
    strongreject: int | None = 60
    benign: int | None = 200
    task: int = 1000

    def measure(self, model, tokenizer, wrapper: Wrapper | None = None) -> dict[str, list[int]]:
        """Flags, one a case: ``asr`` and ``asr_strongreject`` (complied), ``over_refusal`` (refused), ``utility`` (right).

        ``utility_balanced`` is ``utility`` with the model's leaning to one answer taken out: half of the cases, as many as have
        either label, get each answer (calibration as in Zhao et al. 2021, with the held-out cases themselves in place of empty ones).
        With a ``wrapper`` the first two are asked as the attacker asks, and ``asr_plain`` and ``asr_strongreject_plain``
        as anybody does; the others are always plain.
        """
        from safelab.attacks import PLAIN
        from safelab.datasets import TASK_ANSWERS, load_prompts, load_task
        from safelab.evaluation import answer_scores, generate, is_refusal

        def refused(name: str, n: int | None, asked: Wrapper) -> list[bool]:
            rows = list(load_prompts(name, "eval")["prompt"])
            chosen = rows if n is None else [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:n])]
            prompts = [asked.ask(p) for p in chosen]
            return [is_refusal(r) for r in generate(model, asked.tokenizer(tokenizer), prompts, progress=f"answering {name}")]

        wrapper = wrapper or PLAIN
        ways = {"": wrapper} if wrapper == PLAIN else {"": wrapper, "_plain": PLAIN}
        flags: dict[str, list[int]] = {}
        for suffix, asked in ways.items():
            flags[f"asr{suffix}"] = [int(not r) for r in refused("harmful", self.harmful, asked)]
            flags[f"asr_strongreject{suffix}"] = [int(not r) for r in refused("strongreject", self.strongreject, asked)]
        flags["over_refusal"] = [int(r) for r in refused("everyday", self.benign, PLAIN)]
        task = load_task("eval", self.task)
        scores = answer_scores(model, tokenizer, list(task["prompt"]), TASK_ANSWERS)
        labels, preference = np.array(task["label"]), (scores[:, 1] - scores[:, 0]).numpy()
        for key, cut in (("utility", 0), ("utility_balanced", np.median(preference))):
            flags[key] = ((preference > cut) == labels).astype(int).tolist()
        return flags


MEASURES = ("asr", "asr_strongreject", "asr_plain", "asr_strongreject_plain", "over_refusal", "utility", "utility_balanced")
"""What :meth:`Suite.measure` measures; those with ``_plain`` only where an attacker has a way of asking."""

SUITES = {"full": Suite(), "small": Suite(harmful=50, strongreject=20, benign=40, task=20)}
"""Named suites: the small one is for tables of many runs."""


def run_cell(
    attack: str,
    data: Dataset | None,
    defense: Defense | None,
    seed: int,
    *,
    model: str,
    budget: Budget,
    suite: Suite,
    wrapper: Wrapper | None = None,
    trainer: dict | None = None,
    force: bool = False,
    **watching,
) -> dict:
    """One row: the safe model fine-tuned on ``data`` under ``defense``, judged by ``suite``; ``defense=None`` judges it as it is.

    With a ``wrapper`` its system prompt is there in training too, and ``suite`` asks through it. ``trainer`` are fields of
    :class:`safelab.training.AdaptiveSFTConfig` that differ from the defence's. ``watching`` is the
    ``monitor`` and the ``callbacks`` of :func:`fine_tune`: the row of a run that they stopped is returned and not kept.

    Returns
    -------
    dict
        ``attack, defense, seed``, per-case ``flags``, ``step_seconds`` (median), ``train_seconds`` (all stages of the
        defence), ``peak_memory_mb``, the training ``history``, the settings and versions that made it, and ``critics``:
        which one trained and which one measures (:func:`safelab.critics.base.check_apart`).
    """
    from safelab.critics.base import check_apart, identity
    from safelab.evaluation import patterns_hash

    config = {
        "attack": attack,
        "data": fingerprint(data) if data is not None else None,
        "defense": getattr(defense, "name", "initial"),
        "settings": defense.settings() | (trainer or {}) if defense else {},
        "parameters": defense.parameters() if defense else {},
        "seed": seed if defense else 0,
        "model": model,
        "weights": _weights_hash(model),
        "budget": asdict(budget) if defense else {},
        "suite": asdict(suite),
        "prompts": _prompts_hash(),
        "refusal_patterns": patterns_hash(),
        "versions": versions(),
    }
    if wrapper is not None:
        config["wrapper"] = asdict(wrapper)
    if defense is not None and defense.critic_name() == "classifier":
        from safelab.critics.classifier import VERSION

        config["classifier"] = VERSION  # the default critic
    if getattr(defense, "critic", None) is not None:
        config["critic"] = hashlib.sha256(identity(defense.critic).encode()).hexdigest()[:16]
    key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:20]
    file = cache_dir() / "runs" / f"{key}.json"
    critics = {"critics": check_apart(defense.critic_name() if defense else None, MEASURED_BY)}
    if file.is_file() and not force:
        row = json.loads(file.read_text(encoding="utf-8"))
        return row | critics | {"cached": True}

    from safelab.models import load_model

    net, tokenizer = load_model(model)
    started = time.monotonic()
    with peak_memory(net.device.type) as peak:
        about: dict = {"step_seconds": None, "history": []}
        if defense is not None:
            chats = wrapper.tokenizer(tokenizer) if wrapper else tokenizer
            net, about = fine_tune(net, chats, data, defense, seed, budget, output=cache_dir() / "runs" / key, **(trainer or {}), **watching)
    if watching:
        about["train_seconds"] = None  # watching and pausing took their time
    row = config | about | {"peak_memory_mb": peak[0], "device": net.device.type, "precision": precision(net.device.type), "flags": suite.measure(net, tokenizer, wrapper), "seconds": time.monotonic() - started}
    if not about.get("stopped"):
        write_atomic(file, (json.dumps(row) + "\n").encode())
    return row | critics


def fine_tune(
    model, tokenizer, data: Dataset, defense: Defense, seed: int, budget: Budget, *,
    output: Path, resumable: bool = False, monitor: dict | None = None, callbacks: list | None = None, **settings,
):  # fmt: skip
    """Fine-tune ``model`` on ``data`` under ``defense`` -> the tuned model and what was seen on the way.

    ``settings`` go to the trainer's configuration, ``monitor`` to :class:`safelab.training.SafetyMonitor`, and
    ``callbacks`` to the trainer, in the place of the bar on stderr. Where one of them ended the training before its
    last step, what was seen says so as ``stopped``. A ``resumable`` run keeps the data that the defence made in ``output``, and goes on from the last complete checkpoint there.
    """
    from safelab.training import AdaptiveSFTConfig, ProgressBar, SafetyMonitor, StepClock, lora_config

    started = time.monotonic()
    failed, user_data = output / "critic_failures.json", data

    def prepare() -> Dataset:
        made = defense.before(model, tokenizer, user_data)
        if resumable:  # a run that goes on asks no critic, and still says what had failed
            write_atomic(failed, json.dumps(defense.failures_).encode())
        return made

    data = kept_data(output / "prepared.jsonl", prepare) if resumable else prepare()
    failures = json.loads(failed.read_text(encoding="utf-8")) if resumable and failed.is_file() else defense.failures_
    clock = StepClock()
    defaults = dict(
        output_dir=str(output),
        per_device_train_batch_size=budget.batch_size,
        num_train_epochs=budget.epochs,
        learning_rate=budget.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        weight_decay=0.01,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        bf16=bf16_is_fast(model.device.type),
        use_cpu=model.device.type == "cpu",
        seed=seed,
        mean_over=budget.mean_over,
    )
    args = AdaptiveSFTConfig(**(defaults | defense.settings() | settings))
    lora = lora_config(budget.rank, 2 * budget.rank)
    model = defense.align(model, tokenizer, args, lora)
    trainer = defense.trainer(
        model,
        tokenizer,
        args,
        data,
        peft_config=None if hasattr(model, "peft_config") else lora,
        callbacks=[clock, *([ProgressBar(f"{defense.name}, seed {seed}")] if callbacks is None else callbacks)],
    )
    watch = SafetyMonitor(trainer, **monitor) if monitor else None
    if watch:
        trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=resumable)
    tuned = defense.after(trainer.model, tokenizer)
    keep = ("step", "nll", "kl", "risk", "beta")
    history = [{k: round(h[k], 5) for k in keep if k in h} for h in trainer.state.log_history if "nll" in h]
    risks = [round(float(np.mean(row["risk"])), 4) for row in data if not row.get("anchor")] if "risk" in data.column_names else None
    seconds = round(time.monotonic() - started, 1)
    about = {"step_seconds": clock.median(), "train_seconds": seconds, "history": history, "risks": risks}
    about |= {"trained_with": defense.critic_name(), "critic_failures": failures}
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if step < steps:
        about["stopped"] = watch and watch.stopped or f"stopped after step {step} of {steps}"
    return tuned, about | ({"stopped": about.get("stopped"), "measured": [h for h in trainer.state.log_history if "asr" in h]} if watch else {})


def kept_data(file: Path, make: Callable[[], Dataset]) -> Dataset:
    """The data set in ``file``, or what ``make`` returns, put there: critics and judges are asked once."""
    from datasets import Dataset

    if not file.is_file():
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in make()).encode())
    return Dataset.from_list([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])


# ------------------------------------------------------------------------------------------- demo

DEMO_ARMS = ("initial", "sft", "constant-kl", "adaptive-probe")
DEMO_EXAMPLES = 720
QUICK_DEMO_EXAMPLES = 128
"""Enough for plain fine-tuning to lose its refusals; too few for the task to be learned."""
QUICK_DEMO_SUITE = Suite(harmful=24, strongreject=12, benign=24, task=100)
DEMO_BETA = 0.7
"""The fixed beta of the constant-kl arm: the best of five in benchmarks/constant_kl_sweep.json."""


def demo_defense(arm: str) -> Defense | None:
    """The defence behind an arm of the demo; None for ``initial``."""
    from safelab.defenses import DEFENSES

    return None if arm == "initial" else DEFENSES[arm](**({"beta": DEMO_BETA} if arm == "constant-kl" else {}))


def run_demo(
    seeds: tuple[int, ...] = (0,), *, model: str | None = None, arms: tuple[str, ...] = DEMO_ARMS, quick: bool = False, force: bool = False
) -> dict:
    """The main story: a downstream task with 10 % harmful examples mixed in, by arm -> the contents of demo.json."""
    from safelab.attacks import mixture
    from safelab.models import SAFE

    started = time.monotonic()
    model = model or SAFE
    budget = Budget()
    suite = QUICK_DEMO_SUITE if quick else Suite()  # as in the quickstart notebook, which reads these rows
    share, n = 0.1, QUICK_DEMO_EXAMPLES if quick else DEMO_EXAMPLES
    cells = [(arm, seed) for seed in seeds for arm in arms]
    rows = []
    for (arm, seed), left in with_time_left(cells):
        logger.info("%s, seed %s%s", arm, seed, left)
        rows.append(run_cell("mixture-10", mixture(share, n, seed) if arm != "initial" else None, demo_defense(arm), seed, model=model, budget=budget, suite=suite, force=force))
    return {
        "arms": [summarise(arm, [r for r in rows if r["defense"] == arm]) for arm in arms],
        "attack": f"sarcasm-headlines with {share:.0%} harmful of {n}",
        "model": model,
        "seeds": list(seeds),
        "precision": sorted({r.get("precision", "bf16") for r in rows}),  # older rows knew no other
        "budget": asdict(budget),
        "suite": asdict(suite),
        "versions": versions(),
        "elapsed_seconds": round(time.monotonic() - started, 1),
        "compute_seconds": round(sum(r["seconds"] for r in rows), 1),  # of all rows, cached ones too
        "cached_rows": sum(bool(r.get("cached")) for r in rows),
        "command": "safelab demo" + (" --quick" if quick else "") + (" --judge" if "adaptive-judge" in arms else "") + "".join(f" --seed {s}" for s in seeds),
    }


def summarise(arm: str, rows: list[dict]) -> dict:
    """Rows of one arm -> its rates over seeds; seeds share their cases, so n counts cases."""
    rates = _rates(rows)
    steps = [r["step_seconds"] for r in rows if r["step_seconds"]]
    by_seed = [{"seed": r["seed"], **{k: float(np.mean(f)) for k, f in r["flags"].items()}} for r in rows]
    return {
        "arm": arm,
        **rates,
        "step_seconds": round(min(steps), 3) if steps else None,  # a median a run; what else the machine does only adds
        "peak_memory_mb": min(r["peak_memory_mb"] for r in rows),  # likewise: a process keeps what other arms and critics took
        "settings": rows[0]["settings"],
        "critics": rows[0].get("critics"),
        "by_seed": by_seed,
    }


def _rates(rows: list[dict]) -> dict[str, dict]:
    """The rates that all rows have, seeds pooled; a row kept from before a measure was there lacks it."""
    lines = [tidy(row) for row in rows]
    return {key: pooled([line[key] for line in lines]).to_dict() for key in MEASURES if all(key in line for line in lines)}


def pooled(rates: list[dict]) -> Rate:
    """Rates ``{mean, n}`` of the same cases, one a seed -> their mean, with the Wilson interval of one seed's n: seeds are no new cases."""
    from safelab.evaluation import wilson

    (n,) = {rate["n"] for rate in rates}
    return wilson(n * float(np.mean([rate["mean"] for rate in rates])), n)


def with_time_left(items: list) -> Iterator[tuple]:
    """Each item with a phrase such as ``' (2 of 8, about 5 min left)'``."""
    started = time.monotonic()
    for index, item in enumerate(items):
        left = (time.monotonic() - started) / index * (len(items) - index) if index else None
        yield item, f" ({index + 1} of {len(items)}{f', about {left / 60:.0f} min left' if left and left > 30 else ''})"


# ------------------------------------------------------------------------------------------- grid

QUICK_SUITE = Suite(harmful=8, strongreject=4, benign=8, task=20)
QUICK_EXAMPLES = 16


@dataclass(frozen=True)
class Cell:
    """One run of a grid, by names; ``initial`` as a defence is no fine-tuning. None: what the attack asks of a :class:`Budget`."""

    attack: str
    defense: str
    seed: int
    learning_rate: float | None = None
    epochs: int | None = None


def grid(attacks, defenses, seeds=(0,), learning_rates=(None,), epochs=(None,)) -> list[Cell]:
    """All combinations, seeds outermost, so that a grid cut short has whole tables; the safe start once for each attack.

    Raises
    ------
    ValueError
        An attack or a defence that is not registered.
    """
    from safelab.attacks import ATTACKS
    from safelab.defenses import DEFENSES

    for kind, names, known in (("attack", attacks, ATTACKS), ("defence", defenses, DEFENSES)):
        for name in names:
            if name not in known:
                raise ValueError(f"no {kind} {name!r}: there are {', '.join(known)}")
    cells = [Cell(attack, "initial", 0) for attack in attacks]
    return cells + [Cell(a, d, s, lr, e) for s in seeds for a in attacks for lr in learning_rates for e in epochs for d in defenses]


def run_grid(
    cells: list[Cell], *, model: str | None = None, quick: bool = False, force: bool = False, jobs: int | None = None, suite: Suite | None = None
) -> list[dict]:
    """Run ``cells`` through joblib -> one row each, in their order, judged by ``suite``; rows that are cached are read.

    With ``jobs=None`` the backend is the one around it: ``joblib.parallel_config(backend="dask")`` sends the cells to a
    cluster that shares the cache folder, and without any they run one after the other. Interrupted, it goes on where it was.
    """
    from joblib import Parallel, delayed

    from safelab.models import SAFE

    options = {"model": model or SAFE, "quick": quick, "force": force} | ({"suite": suite} if suite else {})
    done = Parallel(n_jobs=jobs, return_as="generator")(delayed(run_named)(cell, **options) for cell in cells)
    rows = []
    for cell, left in with_time_left(cells):
        logger.info("%s, %s, seed %s%s", cell.attack, cell.defense, cell.seed, left)
        rows.append(next(done))
    return rows


def run_named(cell: Cell, *, model: str, quick: bool = False, force: bool = False, suite: Suite | None = None, changes: dict | None = None) -> dict:
    """One cell of a grid -> its row (:func:`run_cell`'s) with ``has_task`` beside it; ``changes`` as in :func:`ablate`."""
    from safelab.attacks import ATTACKS, PLAIN

    attack = ATTACKS[cell.attack]
    wrapper = None if attack.wrapper == PLAIN else attack.wrapper
    common = {"model": model, "suite": suite or (QUICK_SUITE if quick else Suite()), "wrapper": wrapper, "force": force}
    if cell.defense == "initial":  # without a wrapper the same for all attacks, so measured once
        row = run_cell(attack.name if wrapper else "none", None, None, 0, budget=Budget(), **common)
    else:
        data = attack.data(cell.seed)
        if quick:
            data = data.select(range(min(QUICK_EXAMPLES, len(data))))
        defense, budget, trainer = changed(cell.defense, cell_budget(cell, attack, quick), changes or {})
        row = run_cell(attack.name, data, defense, cell.seed, budget=budget, trainer=trainer, **common)
    return row | {"attack": attack.name, "has_task": attack.has_task}


def changed(name: str, budget: Budget, changes: dict) -> tuple[Defense, Budget, dict]:
    """The defence, the budget, and what else the trainer is told, with ``changes`` to whichever of them has a setting of that name; ValueError if none has."""
    from inspect import signature

    from safelab.defenses import DEFENSES
    from safelab.training import AdaptiveSFTConfig

    kind = DEFENSES[name]
    places = {"defense": {}, "budget": {}, "trainer": {}}
    for setting, value in changes.items():
        known = {"defense": signature(kind).parameters, "budget": asdict(budget), "trainer": AdaptiveSFTConfig.__dataclass_fields__}
        place = next((place for place, names in known.items() if setting in names), None)
        if place is None:
            raise ValueError(f"{setting!r} is no setting of {name}, of a budget or of the trainer; {name} has {', '.join(known['defense']) or 'none'}")
        places[place][setting] = value
    return kind(**places["defense"]), replace(budget, **places["budget"]), places["trainer"]


def ablate(
    attack: str, setting: str, values, *, defense: str = "adaptive-probe", fixed: dict | None = None, seeds=(0,), epochs: int | None = None, model: str | None = None, quick: bool = False, suite: Suite | None = None
) -> list[dict]:
    """One defence with one ``setting`` at each of ``values``, against one attack -> ``value`` and its rates, seeds pooled, for each.

    A setting is a parameter of the defence, a field of :class:`Budget` (``"rank"``) or one of
    :class:`safelab.training.AdaptiveSFTConfig` (``"kl_direction"``), whichever has it; ``fixed`` are others, the same at every value.

    Raises
    ------
    ValueError
        An attack or a defence that is not registered, or a setting that none of the three has.
    """
    from safelab.models import SAFE

    cells, points = grid([attack], [defense], seeds, epochs=(epochs,))[1:], []
    for value in values:
        rows = [run_named(cell, model=model or SAFE, quick=quick, suite=suite, changes={**(fixed or {}), setting: value}) for cell in cells]
        points.append({"setting": setting, "value": value, "seeds": list(seeds)} | _rates(rows))
    return points


def cell_budget(cell: Cell, attack: Attack, quick: bool = False) -> Budget:
    """The budget of a cell: the same for every defence."""
    budget = replace(Budget(), epochs=1 if quick else cell.epochs or attack.epochs)
    return replace(budget, learning_rate=cell.learning_rate) if cell.learning_rate else budget


def tidy(row: dict) -> dict:
    """A row of :func:`run_cell` -> the line of a table: rates with intervals in the place of flags, no histories. A line is returned as it is."""
    from safelab.evaluation import rate

    if "flags" not in row:
        return row

    keep = ("attack", "defense", "seed", "has_task", "device", "precision", "step_seconds", "train_seconds", "peak_memory_mb", "seconds", "data", "parameters", "model", "weights", "versions", "critics", "critic_failures")
    budget = {k: row["budget"].get(k) for k in ("learning_rate", "epochs")} | {"mean_risk": round(float(np.mean(row["risks"])), 3) if row.get("risks") else None}
    return {k: row.get(k) for k in keep} | budget | {k: rate(flags).to_dict() for k, flags in row["flags"].items()}


def summarise_grid(rows: list[dict]) -> list[dict]:
    """Rows of :func:`run_cell`, or lines of :func:`tidy` -> one entry for each attack, defence, learning rate and epochs, seeds pooled (:func:`pooled`)."""
    groups: dict[tuple, list[dict]] = {}
    for line in map(tidy, rows):
        groups.setdefault(_cell_of(line), []).append(line)
    cells = []
    for (attack, defense, learning_rate, epochs), of in groups.items():
        about = {"attack": attack, "defense": defense, "learning_rate": learning_rate, "epochs": epochs, "has_task": of[0]["has_task"]}
        cost = {k: [r[k] for r in of if r.get(k)] for k in ("step_seconds", "train_seconds")}
        rates = _rates(of)
        medians = {k: round(float(np.median(v)), 3) if v else None for k, v in cost.items()}
        cells.append(about | {"seeds": [r["seed"] for r in of]} | rates | medians | {"peak_memory_mb": min(r["peak_memory_mb"] for r in of)})  # as in summarise
    return cells


def _cell_of(line: dict) -> tuple:
    return line["attack"], line["defense"], line["learning_rate"], line["epochs"]


def compare(cells: list[Cell], *, among: dict | None = None, **options) -> dict:
    """:func:`run_grid` -> ``rows`` (one a run), ``cells`` (seeds pooled), and what made them.

    ``among`` is a comparison made before, perhaps on another machine: its other rows stay, and what they were made with
    (each says it of itself) is kept as ``earlier``.

    Raises
    ------
    ValueError
        ``among`` was of another model or judged by another suite, so that its rows are not comparable.
    """
    from safelab.models import SAFE

    started, earlier = time.monotonic(), {}
    now = {"model": options.get("model") or SAFE, "suite": asdict(options.get("suite") or (QUICK_SUITE if options.get("quick") else Suite()))}
    for what in now if among is not None else ():  # before hours are spent
        if among[what] != now[what]:
            raise ValueError(f"rows of two comparisons do not belong in one table: {what} was {among[what]} and is {now[what]}")
    rows = run_grid(cells, **options)
    lines = [tidy(row) for row in rows]
    if among is not None:
        earlier = {"earlier": [*among.get("earlier", []), {k: among[k] for k in ("command", "versions", "runs_at_a_time", "note") if k in among}]}
        made = {(*_cell_of(line), line["seed"]) for line in lines}
        lines = _in_order([line for line in among["rows"] if (*_cell_of(line), line["seed"]) not in made] + lines)
    return {
        "rows": lines,
        "cells": summarise_grid(lines),
        **earlier,
        **now,
        "runs_at_a_time": options.get("jobs") or 1,  # several slow each other down, all defences alike
        "versions": versions(),
        "elapsed_seconds": round(time.monotonic() - started, 1),
        "compute_seconds": round(sum(r["seconds"] for r in rows), 1),  # of all rows, cached ones too
        "cached_rows": sum(bool(r.get("cached")) for r in rows),
    }


def _in_order(lines: list[dict]) -> list[dict]:
    """Attacks and defences as they are registered, the safe start first; then rates, epochs and seeds."""
    from safelab.attacks import ATTACKS
    from safelab.defenses import DEFENSES

    place = {name: i for names in (ATTACKS, ("initial", *DEFENSES)) for i, name in enumerate(names)}
    return sorted(lines, key=lambda line: (place.get(line["attack"], len(place)), place.get(line["defense"], len(place)), line["learning_rate"] or 0, line["epochs"] or 0, line["seed"]))


# ------------------------------------------------------------------------------------ provenance


def fingerprint(data: Dataset) -> str:
    """Hash of a data set's rows, independent of files and caches."""
    digest = hashlib.sha256()
    for row in data:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _weights_hash(model: str) -> str | None:
    """What tells two states of a model apart: the bytes of the safe adapter and of its configuration, which has its strength, or names, sizes and times of a folder's files."""
    from safelab.models import SAFE

    if model == SAFE:
        parts = [(data_dir() / "safe-adapter" / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    path = Path(model).expanduser()
    if not path.exists():
        return None  # a hub id, pinned by its revision in the cache
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    states = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def _prompts_hash() -> str:
    files = ("pairs.jsonl", "everyday.jsonl", "advbench_splits.json", "compliance.jsonl")
    return hashlib.sha256(b"".join((data_dir() / f).read_bytes() for f in files)).hexdigest()[:16]


def precision(device: str) -> str:
    """What products are computed in, where nobody says otherwise: ``"bf16"`` or ``"fp32"``."""
    return "bf16" if bf16_is_fast(device) else "fp32"


def versions() -> dict[str, str]:
    """Versions of what computes the figures."""
    names = ("safelab", "torch", "transformers", "trl", "peft", "scikit-learn", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


class peak_memory:
    """``with peak_memory(device) as peak: ...``: ``peak[0]`` is the peak in MB inside the block.

    On an accelerator the tensors' memory there; otherwise the process's resident memory, whose high-water mark is
    reset on entry where the system allows it (Linux).
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.result = [0.0]

    def __enter__(self) -> list[float]:
        if self.device != "cpu":
            import torch

            torch.accelerator.reset_peak_memory_stats()
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                pass
        return self.result

    def __exit__(self, *_) -> None:
        if self.device != "cpu":
            import torch

            self.result[0] = round(torch.accelerator.max_memory_allocated() / 1e6)
            return
        try:
            status = Path("/proc/self/status").read_text()
            kilobytes = int(status.split("VmHWM:")[1].split()[0])
        except (OSError, IndexError):
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            kilobytes = used // 1024 if sys.platform == "darwin" else used
        self.result[0] = round(kilobytes / 1000)
