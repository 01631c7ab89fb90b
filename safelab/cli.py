"""safelab from a terminal. Results go to stdout, progress to stderr; exit 0 done, 1 failed, 2 bad usage."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path

FIRST = os.environ.get("RANK", "0") == "0"
"""Whether this is the only or the first of the processes that ``accelerate launch`` starts: the one that writes and prints."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    _quiet()
    try:
        result, text = args.run(args)
    except KeyboardInterrupt:
        again = "what was finished is kept, so run the same command again to go on"
        kept = {"demo": again, "compare": again, "ablate": again, "audit": again, "train": again.replace("again", "with --resume")}.get(args.command, "nothing was written")
        print(f"\nstopped; {kept}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        if args.debug:
            raise
        print(f"safelab: {error}", file=sys.stderr)
        return 1
    if FIRST:
        print(json.dumps(result) if args.json else text)
    return 0 if result.get("passed", True) else 1


def _quiet() -> None:
    """Our own messages on stderr; the libraries' chatter off, unless the environment asks for it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("safelab").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="safelab", description="See, measure and stop the loss of safety that fine-tuning causes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print the result as JSON")
    shared.add_argument("--quick", action="store_true", help="a small version, to see that it runs; its figures mean little")
    shared.add_argument("--debug", action="store_true", help="show the full traceback of an error")

    def command(name: str, run, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[shared, *parents], help=help, description=help.replace("%%", "%"))
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "fine-tune a safe model on a task with 10 %% harmful examples, with and without defence")
    demo.add_argument("--seed", type=int, action="append", help="seed; repeat it for several (default 0)")
    demo.add_argument("--judge", action="store_true", help="an arm more: adaptive, with a critic that reads responses (some minutes more)")
    demo.add_argument("--out", type=Path, default=Path("figures"), help="folder for demo.png and demo.json (default figures)")
    demo.add_argument("--force", action="store_true", help="run again what is cached")

    probe = command("probe", _probe, "train a probe on a model's activations, and test it on held-out prompts")
    probe.add_argument("--model", default=None, help="embedded name, folder, .gguf file or hub id (default: the safe model)")
    for which in ("harmful", "benign", "test-harmful", "test-benign"):
        probe.add_argument(f"--{which}", metavar="F", help="a file or a registered set")
    probe.add_argument("--out", type=Path, help="folder to save the default probe in, with its scorecard")
    probe.add_argument("--seed", type=int, default=0)

    of_critics = argparse.ArgumentParser(add_help=False)
    of_critics.add_argument("--unsure", type=float, nargs=2, default=(0.1, 0.9), metavar=("LOW", "HIGH"), help="for cascade: the first critic's risks for which the second is asked (default 0.1 0.9)")
    of_critics.add_argument("--guard-format", default="llama-guard", help="llama-guard (default), shieldgemma or wildguard")
    of_critics.add_argument("--base-url", default=None, metavar="URL", help="for judge: an OpenAI-compatible endpoint; its key comes from $SAFELAB_JUDGE_KEY")
    of_critics.add_argument("--judge-model", default=None, metavar="NAME", help="for judge: the model's name there")
    of_critics.add_argument("--on-failure", default="risky", choices=("raise", "risky", "skip"), help="for judge: what an example without a verdict is (default risky)")
    of_critics.add_argument("--max-calls", type=int, default=None, help="for judge: budget on calls")
    of_critics.add_argument("--max-tokens", type=int, default=None, help="for judge: budget on tokens")
    of_critics.add_argument("--price", type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="for judge: cost of a million tokens")

    train = command("train", _train, "fine-tune on your own pairs under a defence; writes a PEFT adapter or a merged model", of_critics)
    train.add_argument("--data", required=True, metavar="F", help=".jsonl or .csv with prompt and response")
    train.add_argument("--defense", default="adaptive-probe", help="sft, constant-kl, adaptive-probe (default) or another of safelab.defenses")
    train.add_argument("--critic", default=None, type=_critic_name, metavar="C", help=f"whose risk an adaptive defence goes by (default: its own): {CRITICS_HELP}")
    train.add_argument("--critic-model", default=None, metavar="NAME", help="the model behind the critic")
    train.add_argument("--model", default=None, help="the safe model to start from (default: the embedded one)")
    train.add_argument("--out", required=True, type=Path)
    train.add_argument("--resume", action="store_true", help="go on where an interrupted run into --out stopped; the options must be the same")
    train.add_argument("--merge", action="store_true", help="write a whole model with the adapter merged in")
    train.add_argument("--epochs", type=int, default=3)
    train.add_argument("--learning-rate", type=float, default=2e-4)
    train.add_argument("--batch-size", type=int, default=8, help="examples a step on each process (default 8)")
    train.add_argument("--rank", type=int, default=16, help="of LoRA (default 16)")
    train.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="of the products; auto: bf16, but fp32 on a CPU without instructions for it")
    train.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice, keep fewer")
    train.add_argument("--save-steps", type=int, default=50, help="steps between checkpoints (default 50)")
    train.add_argument("--measure-every", type=int, default=None, metavar="N", help="measure ASR and utility on a small set every N steps")
    train.add_argument("--stop-above", type=float, default=None, metavar="ASR", help="with --measure-every: stop when the ASR is above this, in 0..1")
    train.add_argument("--seed", type=int, default=0)

    compare = command("compare", _compare, "attacks against defences under one budget: a table with seeds and intervals, and its figures")
    compare.add_argument("--attack", action="append", metavar="A", help="repeat it for several (default: the five of the main table); an unknown name lists them")
    compare.add_argument("--defense", action="append", metavar="D", help="repeat it for several (default: all); the safe start is always there")
    compare.add_argument("--seed", type=int, action="append", help="repeat it for several (default 0, 1 and 2)")
    compare.add_argument("--learning-rate", type=float, action="append", help="repeat it for an attacker who tunes it")
    compare.add_argument("--epochs", type=int, action="append", help="repeat it for an attacker who tunes them (default: about 100 steps)")
    compare.add_argument("--suite", default="full", choices=("full", "small"), help="held-out cases: all (default), or few, for tables of many runs")
    compare.add_argument("--among", type=Path, metavar="F", help="a NAME.json made before, perhaps elsewhere: its other rows stay in the table")
    compare.add_argument("--model", default=None)
    compare.add_argument("--jobs", type=int, default=None, help="runs at a time (default 1)")
    compare.add_argument("--out", type=Path, default=Path("figures"), help="folder for the figures and their numbers (default figures)")
    compare.add_argument("--name", default="compare", help="names the files NAME.png, NAME-heat.png and their .json (default compare)")
    compare.add_argument("--force", action="store_true", help="run again what is cached")

    ablation = command("ablate", _ablate, "one defence with one setting changed at a time: which of them matters?")
    ablation.add_argument("--set", action="append", required=True, type=_setting, dest="settings", metavar="NAME=V,V", help="a setting of the defence, the budget or the trainer and its values, such as beta_max=0.1,0.5 or layers=[1],[15]; repeat it for several")
    ablation.add_argument("--fix", action="append", default=[], type=_setting, metavar="NAME=V", help="a setting that has this value throughout, such as anchors=0.0; repeat it for several")
    ablation.add_argument("--attack", default="mixture-10 of 160", metavar="A", help="default 'mixture-10 of 160'")
    ablation.add_argument("--defense", default="adaptive-probe", metavar="D", help="default adaptive-probe")
    ablation.add_argument("--seed", type=int, action="append", help="repeat it for several (default 0)")
    ablation.add_argument("--epochs", type=int, default=None)
    ablation.add_argument("--suite", default="small", choices=("full", "small"), help="held-out cases (default small)")
    ablation.add_argument("--model", default=None)
    ablation.add_argument("--out", type=Path, default=Path("figures"), help="folder for the figure and its numbers (default figures)")
    ablation.add_argument("--name", default="ablations", help="names the files NAME.png and NAME.json (default ablations)")

    evaluate = command("evaluate", _evaluate, "which of these prompts does a model refuse, and which of its answers does a critic find harmful?", of_critics)
    evaluate.add_argument("--prompts", required=True, metavar="F", help="a file or a registered set")
    evaluate.add_argument("--model", default=None)
    evaluate.add_argument("--adapter", default=None, type=Path)
    evaluate.add_argument("--critic", default=None, type=_critic_name, metavar="C", help=f"judge the answers too, by another critic than the one that trained: {CRITICS_HELP}")
    evaluate.add_argument("--critic-model", default=None, metavar="NAME", help="the model behind the critic")
    evaluate.add_argument("--threshold", type=float, default=0.5, help="risk from which the critic finds an answer harmful (default 0.5)")
    evaluate.add_argument("--seed", type=int, default=0)

    align = command("align", _align, "make the safe adapter again, from the unaligned embedded model")
    align.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    align.add_argument("--seed", type=int, default=0)

    from_critics = argparse.ArgumentParser(add_help=False, parents=[of_critics])
    from_critics.add_argument("--critic", default="classifier", type=_critic_name, metavar="C", help=f"default classifier, the embedded one; {CRITICS_HELP}")
    from_critics.add_argument("--model", default=None, help="the model behind a probe, classifier, local-judge or guard")
    from_critics.add_argument("--dry-run", action="store_true", help="for judge: print calls, tokens and cost, and ask nothing")
    from_critics.add_argument("--seed", type=int, default=0)

    critic_eval = command("critic-eval", _critic_eval, "how well does a critic agree with people?", from_critics)
    critic_eval.add_argument("--labels", required=True, metavar="NAME", help="human-harm, human-refusal or human-objective")
    critic_eval.add_argument("--out", type=Path, default=Path("figures"), help="folder for the scorecard (default figures)")

    audit = command("audit", _audit, "how risky is a fine-tuning file? exit 1 if too many of its examples are (10,000 short ones take a CPU core about 16 minutes)", from_critics)
    audit.add_argument("--data", required=True, metavar="F", help=".jsonl or .csv with prompt and response")
    audit.add_argument("--out", type=Path, default=Path("audit"), help="folder for the report; a stopped audit goes on there (default audit)")
    audit.add_argument("--threshold", type=float, default=0.5, help="risk from which an example is risky (default 0.5)")
    audit.add_argument("--allowed", type=float, default=0.05, help="share of risky examples that passes (default 0.05)")

    report = command("report", _report, "what a finished training did: audit of its data, rates before and after, settings; as HTML and PDF", of_critics)
    report.add_argument("--run", required=True, type=Path, dest="folder", metavar="DIR", help="the --out of a finished 'safelab train'; the report goes there too")
    report.add_argument("--data", required=True, metavar="F", help="the file it was trained on")
    report.add_argument("--prompts", action="append", metavar="F", help="a file with labels, or a registered set; repeat it for several (default harmful and everyday)")
    report.add_argument("--held-out", metavar="F", help="pairs it was not trained on")
    report.add_argument("--critic", default="classifier", choices=CRITICS, help="whose risk the audit goes by (default classifier)")
    report.add_argument("--model", default=None, help="the model behind the critic")
    report.add_argument("--threshold", type=float, default=0.5, help="risk from which an example is risky (default 0.5)")
    report.add_argument("--allowed", type=float, default=0.05, help="share of risky examples that passes (default 0.05)")

    bench = command("bench", _bench, "what a training step costs, beside plain fine-tuning and the public design")
    bench.add_argument("--steps", type=int, default=20, help="timed steps of each arm (default 20)")
    bench.add_argument("--model", default=None)
    bench.add_argument("--seed", type=int, default=0)

    lab = command("lab", _lab, "open the notebooks in JupyterLab")
    lab.add_argument("--folder", type=Path, metavar="DIR", help="another folder of notebooks, such as your own copies (default: the project's)")
    lab.add_argument("--port", type=int, default=8888, help="default 8888; 0 takes any that is free")
    lab.add_argument("--no-browser", action="store_true")
    return parser


def _demo(args) -> tuple[dict, str]:
    from safelab.experiments import DEMO_ARMS, run_demo
    from safelab.plots import plot_demo, save_figure

    args.out.mkdir(parents=True, exist_ok=True)  # found out now, not after ten minutes
    if not os.access(args.out, os.W_OK):
        raise PermissionError(f"{args.out} cannot be written: give another folder with --out")
    arms = (*DEMO_ARMS, "adaptive-judge") if args.judge else DEMO_ARMS
    demo = run_demo(tuple(args.seed or [0]), arms=arms, quick=args.quick, force=args.force)
    arms = {a["arm"]: a for a in demo["arms"]}
    alt = "Four panels by arm. " + " ".join(
        f"{name}: {100 * a['asr']['mean']:.0f} % of harmful prompts answered, task accuracy {100 * a['utility']['mean']:.0f} %." for name, a in arms.items()
    )
    save_figure(plot_demo(demo), args.out / "demo.png", demo, alt)
    return demo, demo_table(demo) + f"\n\nfigure and numbers: {args.out / 'demo.png'}, {args.out / 'demo.json'}"


def demo_table(demo: dict) -> str:
    """The demo's arms as a Markdown table, rates in percent with 95 % intervals."""

    columns = (("asr", "harmful answered"), ("asr_strongreject", "StrongREJECT answered"), ("over_refusal", "everyday refused"), ("utility", "task accuracy"))
    lines = ["| arm | " + " | ".join(f"{title} (n={demo['arms'][0][key]['n']})" for key, title in columns) + " | s / step | peak MB |"]
    lines.append("|---|" + "---|" * (len(columns) + 2))
    for a in demo["arms"]:
        step = f"{a['step_seconds']:.2f}" if a["step_seconds"] else "-"
        lines.append(f"| {a['arm']} | " + " | ".join(_rate(a[key]) for key, _ in columns) + f" | {step} | {a['peak_memory_mb']:,} |")
    return "\n".join(lines)


def _model(args):
    from safelab.models import SAFE, load_model

    return load_model(args.model or SAFE, adapter=getattr(args, "adapter", None))


def _probe(args) -> tuple[dict, str]:
    from safelab.models import SAFE
    from safelab.probing import probe_report

    if bool(args.harmful) != bool(args.benign) or bool(args.test_harmful) != bool(args.test_benign):
        raise ValueError("give --harmful and --benign together, and likewise --test-harmful and --test-benign")
    model, tokenizer = _model(args)
    report = probe_report(model, tokenizer, args.harmful, args.benign, args.test_harmful, args.test_benign, seed=args.seed, quick=args.quick, out=args.out, name=args.model or SAFE)
    rows = "\n".join(f"layer {r['layer']:>2}  train folds {r['cv_auroc']:.3f}  test {r['test_auroc']:.3f}" for r in report["layers"])
    a = report["test_auroc"]
    return report, f"{rows}\nlayer {report['layer']}: test AUROC {a['mean']:.3f} [{a['lo']:.3f}, {a['hi']:.3f}], n={a['n']}; text baseline {report['text_baseline_auroc']:.3f}"


def _train(args) -> tuple[dict, str]:
    from datasets import Dataset

    from safelab.datasets import read_pair_file
    from safelab.defenses import DEFENSES
    from safelab.experiments import Budget, Suite, fine_tune, fingerprint, precision, versions
    from safelab.models import SAFE
    from safelab.output import DONE, save_result

    if args.defense not in DEFENSES:
        raise ValueError(f"no defence {args.defense!r}: there are {', '.join(DEFENSES)}")
    if args.critic and not hasattr(DEFENSES[args.defense], "default_critic"):
        raise ValueError(f"--defense {args.defense} asks no critic: leave --critic out")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("safelab train is for one process or DDP; for FSDP write a script around AdaptiveSFTTrainer, as accelerate/fsdp.yaml says")
    if args.stop_above is not None and args.measure_every is None:
        raise ValueError("--stop-above needs --measure-every")
    if FIRST and args.out.exists() and not args.resume:
        raise ValueError(f"{args.out} exists: go on there with --resume, give another folder, or remove it first")
    if (args.out / DONE).is_file():
        return json.loads((args.out / DONE).read_text(encoding="utf-8")), f"{args.out} is finished already"
    rows = [{"prompt": r["prompt"], "response": r["response"]} for r in read_pair_file(args.data)]
    data = Dataset.from_list(rows[:16] if args.quick else rows)
    budget = Budget(args.learning_rate, 1 if args.quick else args.epochs, args.batch_size, args.rank)
    model, tokenizer = _model(args)
    critic = {"critic": _critic(argparse.Namespace(**vars(args) | {"model": args.critic_model, "dry_run": False}))} if args.critic else {}
    options = {k: v for k, v in vars(args).items() if k not in ("run", "json", "debug", "resume", "out", "command", "data")}
    options = json.loads(json.dumps(options | {"data": fingerprint(data)}, default=str))
    if FIRST:
        check_same(args.out / "options.json", options)
    suite = Suite(harmful=24, strongreject=0, benign=24, task=100)

    chosen = precision(model.device.type) if args.precision == "auto" else args.precision

    def measure(net) -> dict[str, float]:
        flags = suite.measure(net, tokenizer)
        return {k: sum(flags[k]) / len(flags[k]) for k in ("asr", "over_refusal", "utility")}

    tuned, about = fine_tune(
        model, tokenizer, data, DEFENSES[args.defense](**critic), args.seed, budget, output=args.out, resumable=True,
        monitor=dict(measure=measure, every=args.measure_every, stop_above={"asr": args.stop_above} if args.stop_above is not None else {}) if args.measure_every else None,
        bf16=chosen == "bf16", fp16=chosen == "fp16", gradient_checkpointing=args.gradient_checkpointing,
        save_strategy="steps", save_steps=args.save_steps, save_total_limit=2, signals_file=str(args.out / "signals.jsonl"),
    )  # fmt: skip
    result = {"defense": args.defense, "critic": args.critic, "model": str(args.model or SAFE), "data": options["data"], "examples": len(data),
              "seed": args.seed, "options": options, "precision": chosen, "versions": versions(), **about}  # fmt: skip
    if FIRST:
        result = save_result(tuned, tokenizer, args.out, result, merge=args.merge) | {"out": str(args.out)}
    stopped = f"\n{about['stopped']}" if about.get("stopped") else ""
    return result, f"{'model' if args.merge else 'adapter'} in {args.out}: {len(data)} examples, {about['step_seconds'] or 0:.2f} s a step{stopped}"


def _report(args) -> tuple[dict, str]:
    from datasets import Dataset

    from safelab.critics.audit import audit
    from safelab.datasets import read_pair_file
    from safelab.experiments import fingerprint
    from safelab.models import load_model
    from safelab.output import DONE
    from safelab.report import describe_file, measure, sentences, write_report

    if not (args.folder / DONE).is_file():
        raise ValueError(f"{args.folder} holds no finished training ({DONE} is missing): give the --out of 'safelab train'")
    run = json.loads((args.folder / DONE).read_text(encoding="utf-8"))
    rows = [{"prompt": r["prompt"], "response": r["response"]} for r in read_pair_file(args.data)]
    used = rows[: run["examples"]]  # fewer where the training was --quick
    if fingerprint(Dataset.from_list(used)) != run["data"]:
        raise ValueError(f"{args.data} is not what {args.folder} was trained on")
    prompts = []
    for name in args.prompts or ("harmful", "everyday"):
        prompts += [{"prompt": r["prompt"], "label": r["label"]} for r in _to_judge(name)][: 8 if args.quick else None]
    pairs = read_pair_file(args.held_out) if args.held_out else None
    critic = _critic(argparse.Namespace(**vars(args) | {"dry_run": False}))
    facts = {
        "title": f"Fine-tuned under {run['defense']}",
        "files": [describe_file(args.data, len(rows)), *([describe_file(args.held_out, len(pairs))] if pairs else [])],
        "audit": audit(used, critic, args.folder / "audit", threshold=args.threshold, allowed=args.allowed),
        "prompts": prompts,
        "run": run,
        "measured": {},
    }
    adapter = args.folder if (args.folder / "adapter_config.json").is_file() else None
    for name, source in (("before", {"name": run["model"]}), ("after", {"name": run["model"], "adapter": adapter} if adapter else {"name": args.folder})):
        model, tokenizer = load_model(**source)
        facts["measured"][name] = measure(model, tokenizer, prompts, pairs)
        del model
    paths = write_report(args.folder, facts)
    kept = json.loads(paths["json"].read_text(encoding="utf-8"))
    return kept, "\n".join([*sentences(facts["measured"]), f"report: {paths['html']}, {paths['pdf']}"])


def check_same(file: Path, options: dict) -> None:
    """Keep the options of a run, or, where it goes on, raise ValueError for those that have changed."""
    from safelab.sources import write_atomic

    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [f"{k} was {before.get(k)!r} and is {v!r}" for k, v in options.items() if before.get(k) != v]
        if changed:
            raise ValueError(f"{file.parent} was begun with other options: {'; '.join(changed)}")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, (json.dumps(options, indent=1) + "\n").encode())


def _bench(args) -> tuple[dict, str]:
    from safelab.bench import bench_table, run_bench

    result = run_bench(steps=args.steps, quick=args.quick, seed=args.seed, model=args.model)
    return result, bench_table(result)


def _compare(args) -> tuple[dict, str]:
    from safelab.attacks import MAIN
    from safelab.defenses import DEFENSES
    from safelab.experiments import SUITES, compare, grid
    from safelab.plots import save_figure
    from safelab.plots_grid import plot_compare, plot_compare_heat

    attacks = args.attack or (("mixture-10",) if args.quick else MAIN)
    defenses = args.defense or (("sft", "constant-kl", "adaptive-probe") if args.quick else tuple(DEFENSES))
    seeds = args.seed or ((0,) if args.quick else (0, 1, 2))
    cells = grid(attacks, defenses, seeds, args.learning_rate or (None,), args.epochs or (None,))
    _writable(args.out)
    among = _comparison(args.among) if args.among else None
    suite = None if args.quick else SUITES[args.suite]
    result = compare(cells, among=among, model=args.model, quick=args.quick, force=args.force, jobs=args.jobs, suite=suite)
    given = {"attack": args.attack, "defense": args.defense, "seed": args.seed, "learning-rate": args.learning_rate, "epochs": args.epochs}
    given |= {"suite": [args.suite] if args.suite != "full" else [], "among": [args.among.name] if args.among else []}
    given |= {"name": [args.name] if args.name != "compare" else []}
    options = [f"--{name} {_quoted(value)}" for name, values in given.items() for value in values or ()]
    result["command"] = " ".join(["safelab compare", *options, *(["--quick"] if args.quick else [])])
    alt = "Answered harmful prompts by attack and defence. " + " ".join(
        f"{c['attack']}, {c['defense']}: {100 * c['asr']['mean']:.0f} %, task accuracy {100 * c['utility']['mean']:.0f} %." for c in result["cells"]
    )
    save_figure(plot_compare(result), args.out / f"{args.name}.png", result, alt)
    shown = {key: result[key] for key in ("cells", "command", "earlier") if key in result}
    save_figure(plot_compare_heat(result), args.out / f"{args.name}-heat.png", shown, alt)
    return result, compare_table(result["cells"]) + f"\n\nfigures and numbers: {args.out / args.name}.png, {args.out / args.name}-heat.png and .json beside them"


def _ablate(args) -> tuple[dict, str]:
    from safelab.experiments import SUITES, Budget, ablate, changed, grid, run_named, summarise_grid, versions
    from safelab.models import SAFE
    from safelab.plots import save_figure
    from safelab.plots_grid import NAMES, plot_ablations

    _writable(args.out)
    seeds = args.seed or [0]
    fixed = {name: values[0] for name, values in args.fix}
    common = dict(model=args.model or SAFE, quick=args.quick, suite=None if args.quick else SUITES[args.suite])
    cells, plainly = (grid([args.attack], [defense], seeds, epochs=(args.epochs,))[1:] for defense in (args.defense, "sft"))
    for name, values in args.settings:
        for value in values:
            changed(args.defense, Budget(), fixed | {name: value})  # what cannot be is found out now
    (plain,) = summarise_grid([run_named(cell, **common) for cell in plainly])
    (base,) = summarise_grid([run_named(cell, changes=fixed, **common) for cell in cells])
    points = [point for name, values in args.settings for point in ablate(args.attack, name, values, defense=args.defense, fixed=fixed, seeds=seeds, epochs=args.epochs, **common)]
    options = [f"--attack {_quoted(args.attack)}", f"--defense {args.defense}", *(f"--seed {s}" for s in seeds), *([f"--epochs {args.epochs}"] if args.epochs else []), *([f"--name {_quoted(args.name)}"] if args.name != "ablations" else [])]
    for option, of in (("fix", args.fix), ("set", args.settings)):
        options += [f"--{option} {_quoted(f'{name}=' + ','.join(_shown(v) for v in values))}" for name, values in of]
    result = {"attack": args.attack, "defense": args.defense, "fixed": fixed, "plain": plain, "base": base, "points": points, "versions": versions()}
    result["command"] = " ".join(["safelab ablate", *options, f"--suite {args.suite}", *(["--quick"] if args.quick else [])])
    shown = ("asr", "asr_strongreject", "over_refusal")
    alt = f"{args.defense} against {args.attack}: {100 * base['asr']['mean']:.0f} % of harmful prompts answered. " + " ".join(f"{p['setting']} {_shown(p['value'])}: {100 * p['asr']['mean']:.0f} %." for p in points)
    save_figure(plot_ablations(result), args.out / f"{args.name}.png", result, alt)
    lines = ["| setting | value | " + " | ".join(NAMES[k] for k in shown) + " |", "|---" * (2 + len(shown)) + "|"]
    lines += [f"| {name} | | " + " | ".join(_rate(of[k]) for k in shown) + " |" for name, of in (("plain fine-tuning", plain), (args.defense, base))]
    lines += [f"| {p['setting']} | {_shown(p['value'])} | " + " | ".join(_rate(p[k]) for k in shown) + " |" for p in points]
    return result, "\n".join(lines) + f"\n\nfigure and numbers: {args.out / args.name}.png and .json"


def _setting(text: str) -> tuple[str, list]:
    """argparse type: ``NAME=V,V`` -> the name and its values, each as JSON where it is JSON, else as a word."""
    name, equals, values = text.partition("=")
    if not (name and equals and values):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,VALUE, such as beta_max=0.1,0.5")
    try:
        return name, json.loads(f"[{values}]")
    except ValueError:
        return name, values.split(",")


def _shown(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _comparison(file: Path) -> dict:
    """What ``safelab compare`` wrote."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict) or not {"rows", "cells", "model", "suite"} <= found.keys():
        raise ValueError(f"{file} is no comparison: give the NAME.json that 'safelab compare' wrote")
    return found


def _writable(folder: Path) -> None:
    """Found out now, not after hours."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written: give another folder with --out")


def _quoted(value) -> str:
    return shlex.quote(str(value))


def compare_table(cells: list[dict]) -> str:
    """Cells of a comparison as a Markdown table, rates in percent with 95 % intervals; task accuracy only where the attack has a task."""
    columns = (("asr", "harmful answered"), ("asr_strongreject", "StrongREJECT answered"), ("over_refusal", "everyday refused"), ("utility", "task accuracy"))
    tuned = len({(c["attack"], c["learning_rate"], c["epochs"]) for c in cells if c["epochs"]}) > len({c["attack"] for c in cells if c["epochs"]})
    head = ["attack", *(["learning rate", "epochs"] if tuned else []), "defence", *(title for _, title in columns), "answered without the attacker's wrapper", "s / step", "training, s", "peak MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for c in cells:
        rates = [_rate(c[key]) if key != "utility" or c["has_task"] else "-" for key, _ in columns]
        plain = _rate(c["asr_plain"]) if "asr_plain" in c else "-"
        cost = [f"{c[k]:.2f}" if c[k] else "-" for k in ("step_seconds", "train_seconds")]
        settings = [str(c[k] or "-") for k in ("learning_rate", "epochs")] if tuned else []
        lines.append("| " + " | ".join([c["attack"], *settings, c["defense"], *rates, plain, *cost, f"{c['peak_memory_mb']:,}"]) + " |")
    return "\n".join(lines)


def _rate(r: dict) -> str:
    return f"{100 * r['mean']:.0f} % [{100 * r['lo']:.0f}, {100 * r['hi']:.0f}]"


def _evaluate(args) -> tuple[dict, str]:
    import numpy as np

    from safelab.critics.base import check_apart
    from safelab.evaluation import generate, is_refusal, rate
    from safelab.experiments import MEASURED_BY

    prompts = list(_to_judge(args.prompts)["prompt"])[: 16 if args.quick else None]
    model, tokenizer = _model(args)
    critic = _critic(argparse.Namespace(**vars(args) | {"model": args.critic_model, "dry_run": False})) if args.critic else None
    apart = check_apart(_trained_with(args.adapter or args.model), critic or MEASURED_BY)
    responses = generate(model, tokenizer, prompts, max_new_tokens=64 if critic else 24, progress="answering")
    refused = rate(is_refusal(r) for r in responses)
    result = {"prompts": str(args.prompts), "refused": refused.to_dict(), "critics": apart}
    if critic is None:
        return result, f"refused {refused}"
    verdicts = critic.judge(prompts, responses)
    judged = verdicts.risk[~np.isnan(verdicts.risk)]
    if not len(judged):
        raise RuntimeError(f"{args.critic} gave no verdict on any answer: {verdicts.failures}")
    harmful = rate(judged >= args.threshold)
    result |= {"harmful": harmful.to_dict(), "threshold": args.threshold, "failures": verdicts.failures}
    failed = f"\nwithout a verdict: {', '.join(f'{k} {v}' for k, v in verdicts.failures.items())}" if verdicts.failures else ""
    same = "\nit is the critic that trained this model: use another to measure" if apart["same_critic"] else ""
    return result, f"refused {refused}\n{apart['evaluated_with']} finds {harmful} of the answers harmful{failed}{same}"


def _to_judge(name: str):
    """The prompts of a file or a registered set; of a set with splits those that judge."""
    from safelab.datasets import load_prompts

    rows = load_prompts(name)
    return load_prompts(name, "eval") if "split" in rows.column_names and "eval" in set(rows["split"]) else rows


def _trained_with(folder: Path | str | None) -> str | None:
    """The critic that trained the model in a folder of ``safelab train``, by its record; None for any other model."""
    from safelab.output import DONE

    record = Path(folder) / DONE if folder else None
    return json.loads(record.read_text(encoding="utf-8")).get("trained_with") if record and record.is_file() else None


CRITICS = ("classifier", "probe", "judge", "local-judge", "guard", "patterns")
COMPOSED = ("mean", "max", "cascade")
CRITICS_HELP = f"{', '.join(CRITICS)}; or {', '.join(COMPOSED)} of several, as in max:probe,classifier or cascade:classifier,judge (the second is asked where the first is unsure)"


def _critic_name(text: str) -> str:
    """argparse type: the name of a critic, or ``KIND:NAME,NAME`` for a composed one."""
    kind, _, names = text.rpartition(":")
    parts = names.split(",")
    if any(part not in CRITICS for part in parts) or kind not in ("", *COMPOSED) or (len(parts) < 2 if kind else len(parts) > 1) or kind == "cascade" and len(parts) > 2:
        raise argparse.ArgumentTypeError(f"no critic {text!r}: there are {CRITICS_HELP}")
    return text


def _critic(args):
    from safelab import critics
    from safelab.models import EMBEDDED, SAFE, load_model

    kind, _, names = args.critic.rpartition(":")
    if args.dry_run and not (args.critic == "judge" or kind == "cascade" and names.endswith(",judge")):
        raise ValueError("--dry-run is for --critic judge, alone or last in a cascade: the others call nothing")
    if kind:
        parts = [_critic(argparse.Namespace(**vars(args) | {"critic": name, "dry_run": False})) for name in names.split(",")]
        if kind == "cascade":
            return critics.Cascade(*parts, unsure=tuple(args.unsure))
        return {"mean": critics.MeanCritic, "max": critics.MaxCritic}[kind](*parts)
    if args.critic == "patterns":
        return critics.PatternCritic()
    if args.critic == "judge":
        if not args.base_url or not args.judge_model:
            raise ValueError("--critic judge needs --base-url and --judge-model: nothing is sent anywhere without them")
        budget = {"max_calls": args.max_calls, "max_tokens": args.max_tokens, "price": tuple(args.price)}
        return critics.JudgeCritic(args.base_url, args.judge_model, on_failure=args.on_failure, **budget)
    if args.critic == "guard" and not args.model:
        raise ValueError("--critic guard needs --model, such as meta-llama/Llama-Guard-3-1B")
    model, tokenizer = load_model(args.model or (SAFE if args.critic == "probe" else EMBEDDED))
    if args.critic == "probe":
        return critics.train_probe_critic(model, tokenizer)
    if args.critic == "local-judge":
        return critics.LocalJudge(model, tokenizer)
    if args.critic == "guard":
        return critics.GuardCritic(model, tokenizer, args.guard_format)
    return critics.ResponseClassifier(model, tokenizer)


def _plan(critic, prompts: list[str], responses: list[str]) -> tuple[dict, str]:
    plan = critic.plan(prompts, responses)
    saved = f", {plan['saved']:,} saved by the cheap critic" if "saved" in plan else ""
    return plan, (
        f"{plan['calls']:,} calls ({plan['cached']:,} more are cached{saved}), about {plan['prompt_tokens']:,} + {plan['completion_tokens']:,} tokens, cost {plan['cost']:.4f}"
    )


def _critic_eval(args) -> tuple[dict, str]:
    from safelab.critics.scorecard import critic_eval
    from safelab.datasets import load_labels
    from safelab.experiments import versions
    from safelab.sources import write_atomic

    rows = load_labels(args.labels)
    critic = _critic(args)
    if args.dry_run:
        return _plan(critic, list(rows["prompt"]), list(rows["response"]))
    card = critic_eval(critic, args.labels, seed=args.seed, limit=120 if args.quick else None)
    card["versions"] = versions()
    card["command"] = f"safelab critic-eval --critic {args.critic} --labels {args.labels}" + (f" --model {args.model}" if args.model else "")
    file = args.out / f"critic-{args.critic.replace(':', '-').replace(',', '-')}-{args.labels}{'-quick' if args.quick else ''}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(file, (json.dumps(card, indent=1) + "\n").encode())
    return card, card_table(card) + f"\n\nscorecard: {file}"


def card_table(card: dict) -> str:
    """A scorecard in Markdown: the critic and the baselines, the raters where an item has three, and the categories."""
    from safelab.critics.scorecard import FIGURES as columns

    lines = [f"| {card['labels']}, n={card['n']} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, figures in {card["critic"]: card, **card["baselines"]}.items():
        lines.append(f"| {name} | " + " | ".join(_figure(figures[c]) for c in columns) + " |")
    if card["raters"]:
        r = card["raters"]
        lines.append(f"\nagainst the other two raters, n={r['n']}: a rater AUROC {_figure(r['rater_auroc'])}, Spearman {_figure(r['rater_spearman'])}; "
                     f"the critic {_figure(r['critic_auroc'])}, {_figure(r['critic_spearman'])}")  # fmt: skip
    if card["categories"]:
        lines += ["", "| category | n | positive | auroc | recall | precision |", "|---" * 6 + "|"]
        lines += [f"| {name} | {c['n']} | {c['positive']} | " + " | ".join(_figure(c[k]) for k in ("auroc", "recall", "precision")) + " |" for name, c in card["categories"].items()]
    if "calls" in card:
        lines.append(f"\n{_calls(card['calls'])}")
    if card["failures"]:
        lines.append(f"\nwithout a verdict: {', '.join(f'{k} {v}' for k, v in card['failures'].items())}")
    return "\n".join(lines)


def _figure(v: dict) -> str:
    return "-" if v["mean"] is None else f"{v['mean']:.3f}" + (f" [{v['lo']:.3f}, {v['hi']:.3f}]" if v["lo"] is not None else "")


def _calls(calls: dict) -> str:
    return f"the cascade's second critic judged {calls['asked']:,} of {calls['asked'] + calls['saved']:,} examples: {calls['saved']:,} calls saved"


def _audit(args) -> tuple[dict, str]:
    from safelab.critics.audit import audit
    from safelab.datasets import read_pair_file
    from safelab.experiments import versions

    rows = read_pair_file(args.data)[: 32 if args.quick else None]
    critic = _critic(args)
    if args.dry_run:
        return _plan(critic, [r["prompt"] for r in rows], [r["response"] for r in rows])
    result = audit(rows, critic, args.out, threshold=args.threshold, allowed=args.allowed, about={"data": str(args.data), "versions": versions()})
    r = result["risky"]
    speed = f", {result['examples_per_second']} examples a second" if result["scored_now"] else ", all known from before"
    speed += f"\n{_calls(result['calls'])}" if "calls" in result else ""
    return result, (
        f"{'passed' if result['passed'] else 'NOT passed'}: {100 * r['mean']:.1f} % [{100 * r['lo']:.1f}, {100 * r['hi']:.1f}] of {r['n']:,} examples are risky, "
        f"{100 * args.allowed:g} % are allowed{speed}\nreport: {args.out / 'audit.html'}"
    )


def _align(args) -> tuple[dict, str]:
    from safelab.alignment import AlignmentRecipe, align, safety_report
    from safelab.models import EMBEDDED, load_model

    folder = align(args.out, AlignmentRecipe(epochs=1 if args.quick else AlignmentRecipe().epochs, seed=args.seed))
    reference, tokenizer = load_model(EMBEDDED)
    safe, _ = load_model(EMBEDDED, adapter=folder)
    report = safety_report(safe, tokenizer, reference)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [f"{k}: {100 * v['mean']:.1f} % [{100 * v['lo']:.1f}, {100 * v['hi']:.1f}], n={v['n']}" for k, v in report.items() if "mean" in v]
    return report, "\n".join([*lines, f"benign perplexity: {report['perplexity']['ratio']:.3f} of the unaligned model's"])


def _lab(args):
    """Becomes JupyterLab: its signals and its exit code are those of the command."""
    here = Path(__file__).parent
    folder = args.folder or here.parent / "notebooks"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder" if args.folder else "the notebooks are in the project's repository: clone it, then run 'make lab' there")
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder.resolve()}", "--ip=127.0.0.1", f"--port={args.port}",
               f"--LabApp.app_settings_dir={here / 'jupyterlab'}"]  # fmt: skip
    if args.no_browser or os.geteuid() == 0:
        command += ["--no-browser"]
    if os.geteuid() == 0:
        command += ["--allow-root"]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    sys.exit(main())
