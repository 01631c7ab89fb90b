"""safelab from a terminal. Results go to stdout, progress to stderr; exit 0 done, 1 failed, 2 bad usage."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    _quiet()
    try:
        result, text = args.run(args)
    except KeyboardInterrupt:
        print("\nstopped; what was finished is kept, so run the same command again to go on", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        if args.debug:
            raise
        print(f"safelab: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result) if args.json else text)
    return 0


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

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[shared], help=help, description=help.replace("%%", "%"))
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "fine-tune a safe model on a task with 10 %% harmful examples, with and without defence")
    demo.add_argument("--seed", type=int, action="append", help="seed; repeat it for several (default 0)")
    demo.add_argument("--out", type=Path, default=Path("figures"), help="folder for demo.png and demo.json (default figures)")
    demo.add_argument("--force", action="store_true", help="run again what is cached")

    probe = command("probe", _probe, "train a probe on a model's activations, and test it on held-out prompts")
    probe.add_argument("--model", default=None, help="embedded name, folder, .gguf file or hub id (default: the safe model)")
    for which in ("harmful", "benign", "test-harmful", "test-benign"):
        probe.add_argument(f"--{which}", metavar="F", help="a file or a registered set")
    probe.add_argument("--seed", type=int, default=0)

    train = command("train", _train, "fine-tune on your own pairs under a defence; writes a PEFT adapter")
    train.add_argument("--data", required=True, metavar="F", help=".jsonl or .csv with prompt and response")
    train.add_argument("--defense", default="adaptive-probe", help="sft, constant-kl or adaptive-probe (default)")
    train.add_argument("--model", default=None)
    train.add_argument("--out", required=True, type=Path)
    train.add_argument("--epochs", type=int, default=3)
    train.add_argument("--learning-rate", type=float, default=2e-4)
    train.add_argument("--seed", type=int, default=0)

    evaluate = command("evaluate", _evaluate, "which of these prompts does a model refuse?")
    evaluate.add_argument("--prompts", required=True, metavar="F", help="a file or a registered set")
    evaluate.add_argument("--model", default=None)
    evaluate.add_argument("--adapter", default=None, type=Path)
    evaluate.add_argument("--seed", type=int, default=0)

    align = command("align", _align, "make the safe adapter again, from the unaligned embedded model")
    align.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    align.add_argument("--seed", type=int, default=0)

    lab = command("lab", _lab, "open the notebooks in JupyterLab")
    lab.add_argument("--port", type=int, default=8888)
    lab.add_argument("--no-browser", action="store_true")
    return parser


def _demo(args) -> tuple[dict, str]:
    from safelab.experiments import run_demo
    from safelab.plots import plot_demo, save_figure

    args.out.mkdir(parents=True, exist_ok=True)  # found out now, not after ten minutes
    if not os.access(args.out, os.W_OK):
        raise PermissionError(f"{args.out} cannot be written: give another folder with --out")
    demo = run_demo(tuple(args.seed or [0]), quick=args.quick, force=args.force)
    arms = {a["arm"]: a for a in demo["arms"]}
    alt = "Four panels by arm. " + " ".join(
        f"{name}: {100 * a['asr']['mean']:.0f} % of harmful prompts answered, task accuracy {100 * a['utility']['mean']:.0f} %." for name, a in arms.items()
    )
    save_figure(plot_demo(demo), args.out / "demo.png", demo, alt)
    return demo, demo_table(demo) + f"\n\nfigure and numbers: {args.out / 'demo.png'}, {args.out / 'demo.json'}"


def demo_table(demo: dict) -> str:
    """The demo's arms as a Markdown table, rates in percent with 95 % intervals."""

    def cell(r: dict) -> str:
        return f"{100 * r['mean']:.0f} % [{100 * r['lo']:.0f}, {100 * r['hi']:.0f}]"

    columns = (("asr", "harmful answered"), ("asr_strongreject", "StrongREJECT answered"), ("over_refusal", "everyday refused"), ("utility", "task accuracy"))
    lines = ["| arm | " + " | ".join(f"{title} (n={demo['arms'][0][key]['n']})" for key, title in columns) + " | s / step | peak MB |"]
    lines.append("|---|" + "---|" * (len(columns) + 2))
    for a in demo["arms"]:
        step = f"{a['step_seconds']:.2f}" if a["step_seconds"] else "-"
        lines.append(f"| {a['arm']} | " + " | ".join(cell(a[key]) for key, _ in columns) + f" | {step} | {a['peak_memory_mb']:,} |")
    return "\n".join(lines)


def _model(args):
    from safelab.models import SAFE, load_model

    return load_model(args.model or SAFE, adapter=getattr(args, "adapter", None))


def _probe(args) -> tuple[dict, str]:
    from safelab.probes import probe_report

    if bool(args.harmful) != bool(args.benign) or bool(args.test_harmful) != bool(args.test_benign):
        raise ValueError("give --harmful and --benign together, and likewise --test-harmful and --test-benign")
    model, tokenizer = _model(args)
    report = probe_report(model, tokenizer, args.harmful, args.benign, args.test_harmful, args.test_benign, seed=args.seed, quick=args.quick)
    rows = "\n".join(f"layer {r['layer']:>2}  train folds {r['cv_auroc']:.3f}  test {r['test_auroc']:.3f}" for r in report["layers"])
    a = report["test_auroc"]
    return report, f"{rows}\nlayer {report['layer']}: test AUROC {a['mean']:.3f} [{a['lo']:.3f}, {a['hi']:.3f}], n={a['n']}; text baseline {report['text_baseline_auroc']:.3f}"


def _train(args) -> tuple[dict, str]:
    from datasets import Dataset

    from safelab.datasets import read_pair_file
    from safelab.defenses import DEFENSES
    from safelab.experiments import Budget, fine_tune, fingerprint, versions
    from safelab.sources import atomic_dir

    if args.defense not in DEFENSES:
        raise ValueError(f"no defence {args.defense!r}: there are {', '.join(DEFENSES)}")
    if args.out.exists():
        raise ValueError(f"{args.out} exists: give another folder, or remove it first")
    rows = [{"prompt": r["prompt"], "response": r["response"]} for r in read_pair_file(args.data)]
    data = Dataset.from_list(rows[:16] if args.quick else rows)
    model, tokenizer = _model(args)
    budget = Budget(args.learning_rate, 1 if args.quick else args.epochs)
    with atomic_dir(args.out) as folder:
        tuned, about = fine_tune(model, tokenizer, data, DEFENSES[args.defense](), args.seed, budget, output=folder)
        tuned.save_pretrained(folder)
        result = {"defense": args.defense, "data": fingerprint(data), "examples": len(data), "seed": args.seed, "versions": versions(), **about}
        (folder / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result["out"] = str(args.out)
    return result, f"adapter in {args.out}: {len(data)} examples, {about['step_seconds']:.2f} s a step"


def _evaluate(args) -> tuple[dict, str]:
    from safelab.datasets import load_prompts
    from safelab.evaluation import generate, is_refusal, rate

    rows = load_prompts(args.prompts)
    if "split" in rows.column_names and "eval" in set(rows["split"]):
        rows = load_prompts(args.prompts, "eval")
    prompts = list(rows["prompt"])[: 16 if args.quick else None]
    model, tokenizer = _model(args)
    refused = rate(is_refusal(r) for r in generate(model, tokenizer, prompts, progress="answering"))
    return {"prompts": str(args.prompts), "refused": refused.to_dict()}, f"refused {refused}"


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


def _lab(args) -> tuple[dict, str]:
    import subprocess

    notebooks = Path(__file__).parent.parent / "notebooks"
    if not notebooks.is_dir():
        raise ValueError("the notebooks are in the project's repository: clone it, then run 'make lab' there")
    command = [sys.executable, "-m", "jupyter", "lab", f"--ServerApp.root_dir={notebooks}", "--ip=127.0.0.1", f"--port={args.port}", "--LabApp.news_url=None"]
    if args.no_browser or os.geteuid() == 0:
        command += ["--no-browser"]
    if os.geteuid() == 0:
        command += ["--allow-root"]
    code = subprocess.call(command)
    if code:
        raise RuntimeError(f"JupyterLab ended with exit code {code}")
    return {"exit": code}, ""


if __name__ == "__main__":
    sys.exit(main())
