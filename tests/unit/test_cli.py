"""The commands: exit codes, what goes to stdout and stderr, and what is left on disk; end to end on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import safelab
from safelab import cli
from safelab.critics.base import plain_verdicts
from safelab.datasets import DataError
from safelab.experiments import DEMO_ARMS, Budget

ROOT = Path(safelab.__file__).parents[1]
COMMANDS = ("demo", "probe", "train", "report", "evaluate", "align", "bench", "lab")
PAIRS = [{"prompt": f"How do I bake bread number {i}?", "response": f"Mix flour and water, wait {i} hours."} for i in range(20)]


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    return path


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("How do I bake bread?\nTell me about the city.\nHi\n", encoding="utf-8")
    return path


@pytest.fixture
def run(capfd):
    """``run(*arguments) -> (exit code, stdout, stderr)``, whoever wrote there."""

    def run(*arguments):
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        return code, *capfd.readouterr()

    return run


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------ usage


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["--json"],
        ["train"],
        ["train", "--data", "x.jsonl"],
        ["train", "--out", "x"],
        ["train", "--data", "x.jsonl", "--out", "y", "--epochs", "many"],
        ["train", "--data", "x.jsonl", "--out", "y", "--nonsense"],
        ["evaluate"],
        ["evaluate", "--prompts"],
        ["align"],
        ["demo", "--seed", "x"],
        ["probe", "surplus"],
        ["lab", "--port", "x"],
    ],
    ids=" ".join,
)
def test_bad_usage_exits_2_and_says_so_on_stderr(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.startswith("usage: safelab")


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)], ids=lambda c: " ".join(c) or "safelab")
def test_help_is_complete(capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and err == ""
    assert "%%" not in out and "%(" not in out
    assert all(flag in out for flag in ("--json", "--quick", "--debug")) if command else all(name in out for name in COMMANDS)


def _modules(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after ``code``."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "sklearn", "scipy", "numpy", "matplotlib", "pandas", "umap"}


def test_importing_safelab_and_its_commands_loads_nothing_heavy():
    loaded = _modules("import safelab, safelab.cli, safelab.datasets, safelab.models")
    assert "safelab" in loaded and not HEAVY & loaded


def test_help_loads_nothing_heavy():
    loaded = _modules("import safelab.cli\ntry: safelab.cli.main(['train', '--help'])\nexcept SystemExit: pass")
    assert "safelab" in loaded and not HEAVY & loaded


# ----------------------------------------------------------------------------------------------- errors


FAILURES = {
    # name: (arguments, what stderr must say); {tmp} holds pairs.jsonl, prompts.txt, bad.csv and empty.jsonl
    "no data": ("train --model {model} --out {tmp}/out --data {tmp}/missing.jsonl", "{tmp}/missing.jsonl"),
    "no column": ("train --model {model} --out {tmp}/out --data {tmp}/bad.csv", "{tmp}/bad.csv, line 2: no 'response'"),
    "empty data": ("train --model {model} --out {tmp}/out --data {tmp}/empty.jsonl", "{tmp}/empty.jsonl is empty"),
    "no defence": ("train --model {model} --out {tmp}/out --data {tmp}/pairs.jsonl --defense hope", "no defence 'hope': there are sft,"),
    "no epochs": ("train --model {model} --out {tmp}/out --data {tmp}/pairs.jsonl --epochs 0", "must be positive"),
    "learning rate": ("train --model {model} --out {tmp}/out --data {tmp}/pairs.jsonl --learning-rate -1", "must be positive"),
    "out is a folder": ("train --model {model} --out {tmp} --data {tmp}/pairs.jsonl", "{tmp} exists"),
    "out is a file": ("train --model {model} --out {tmp}/bad.csv --data {tmp}/pairs.jsonl", "{tmp}/bad.csv exists"),
    "no model": ("train --model {tmp}/missing --out {tmp}/out --data {tmp}/pairs.jsonl", "{tmp}/missing"),
    "no config": ("evaluate --model {tmp} --prompts {tmp}/prompts.txt", "{tmp} holds no config.json"),
    "no gguf": ("evaluate --model {tmp}/missing.gguf --prompts {tmp}/prompts.txt", "{tmp}/missing.gguf"),
    "no adapter": ("evaluate --model {model} --adapter {tmp}/missing --prompts {tmp}/prompts.txt", "{tmp}/missing is not a PEFT adapter"),
    "no prompts": ("evaluate --model {model} --prompts {tmp}/missing.txt", "{tmp}/missing.txt"),
    "no set": ("evaluate --model {model} --prompts nosuchset", "nosuchset"),
    "harmful alone": ("probe --model {model} --harmful {tmp}/prompts.txt", "--harmful and --benign together"),
    "test alone": ("probe --model {model} --test-benign {tmp}/prompts.txt", "--test-harmful and --test-benign"),
    "align exists": ("align --out {tmp}", "{tmp} exists"),
    "demo into a file": ("demo --out {tmp}/bad.csv", "{tmp}/bad.csv"),
    "no notebooks": ("lab --folder {tmp}/missing", "{tmp}/missing: no such folder"),
}


@pytest.mark.parametrize("arguments, message", FAILURES.values(), ids=FAILURES)
def test_a_failure_exits_1_with_one_line_on_stderr_and_nothing_on_stdout(tmp_path, pairs, prompts, saved_model, run, arguments, message):
    (tmp_path / "bad.csv").write_text("prompt,answer\nx,y\n")
    (tmp_path / "empty.jsonl").write_text("")
    before, places = _contents(tmp_path), {"tmp": tmp_path, "model": saved_model("llama3")}
    code, out, err = run(*(word.format(**places) for word in arguments.split()), "--json")
    assert (code, out) == (1, "")
    assert err.startswith("safelab: ") and err.endswith("\n") and err.count("\n") == 1
    assert message.format(**places) in err
    assert _contents(tmp_path) == before


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(DataError, match="missing.txt"):
        cli.main(["evaluate", "--prompts", str(tmp_path / "missing.txt"), "--debug"])


# ------------------------------------------------------------------------------------- train and evaluate


def _options(**options) -> list[str]:
    return [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture
def risky(monkeypatch):
    """A stand-in for the probe, which would need the public prompts."""

    class Critic:
        def score(self, prompts, responses):
            return np.linspace(0, 1, len(prompts))

    monkeypatch.setattr("safelab.defenses.adaptive.train_probe_critic", lambda model, tokenizer, layers=None: Critic())


@pytest.mark.parametrize("defense, beta", [("sft", [0.0, 0.0]), ("constant-kl", [0.5, 0.5]), ("adaptive-probe", [0.1, 0.9])])
def test_train_writes_an_adapter_that_evaluate_can_use(tmp_path, pairs, prompts, saved_model, run, risky, defense, beta):
    out, model = tmp_path / "new" / "adapter", saved_model("llama3")
    training = _options(data=pairs, model=model, out=out, defense=defense, epochs=2, seed=3)
    code, text, err = run("train", *training, "--json")
    assert code == 0, err
    result = json.loads(text)
    assert result["defense"] == defense and result["examples"] == 20 and result["seed"] == 3 and result["out"] == str(out)
    steps = 8 if defense == "adaptive-probe" else 6  # 20 examples, and 8 anchors, in batches of 8, twice
    assert [h["step"] for h in result["history"]] == list(range(1, steps + 1))
    assert all(beta[0] - 1e-6 <= h["beta"] <= beta[1] + 1e-6 and ("kl" in h) == (defense != "sft") for h in result["history"])
    assert (result["risks"] or [None])[-1] == (1.0 if defense == "adaptive-probe" else None)
    assert json.loads((out / "training.json").read_text(encoding="utf-8")) == {k: v for k, v in result.items() if k != "out"}
    assert {"adapter_config.json", "adapter_model.safetensors", "training.json"} <= {p.name for p in out.iterdir()}
    assert [p.name for p in out.parent.iterdir()] == ["adapter"]

    code, text, err = run("evaluate", *_options(prompts=prompts, model=model, adapter=out), "--json")
    assert code == 0, err
    refused = json.loads(text)["refused"]
    assert refused["n"] == 3 and 0 <= refused["lo"] <= refused["mean"] <= refused["hi"] <= 1


def test_the_adapter_on_disk_is_what_was_trained(tmp_path, pairs, saved_model, run):
    """It makes the training answers likelier than the model alone does."""
    from safelab.evaluation import perplexity
    from safelab.models import load_model

    out, model = tmp_path / "adapter", saved_model("llama3")
    code, _, err = run("train", *_options(data=pairs, model=model, out=out, defense="sft", epochs=3, learning_rate=0.01))
    assert code == 0, err
    texts = [row["prompt"] for row in PAIRS], [row["response"] for row in PAIRS]
    before, after = (perplexity(*load_model(model, adapter=adapter), *texts) for adapter in (None, out))
    assert after < 0.8 * before


def test_a_training_follows_its_seed(tmp_path, pairs, saved_model, run):
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        code, _, err = run("train", *_options(data=pairs, model=saved_model("llama3"), out=out, defense="sft", seed=seed), "--quick")
        assert code == 0, err
        weights.append((out / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_quick_takes_sixteen_examples_once(tmp_path, pairs, saved_model, run):
    out = tmp_path / "adapter"
    code, text, err = run("train", *_options(data=pairs, model=saved_model("llama3"), out=out, defense="sft"), "--quick", "--json")
    assert code == 0, err
    assert json.loads(text)["examples"] == 16 and len(json.loads(text)["history"]) == 16 // Budget().batch_size


def test_without_json_a_sentence_is_printed(tmp_path, pairs, prompts, saved_model, run):
    out, model = tmp_path / "adapter", saved_model("llama3")
    code, text, _ = run("train", *_options(data=pairs, model=model, out=out, defense="sft"), "--quick")
    assert code == 0 and re.fullmatch(rf"adapter in {re.escape(str(out))}: 16 examples, \d+\.\d\d s a step\n", text)
    code, text, _ = run("evaluate", *_options(prompts=prompts, model=model))
    assert code == 0 and re.fullmatch(r"refused \d+ % \[\d+, \d+\] \(n=3\)\n", text)


@pytest.mark.parametrize("judge, same", [("classifier", True), ("patterns", False)])
def test_the_critic_that_trained_does_not_measure_unnoticed(tmp_path, pairs, prompts, saved_model, run, monkeypatch, caplog, judge, same):
    """A defence's own critic counts, though the command that trained did not name it."""

    class Classifier:
        name = "classifier"

        def judge(self, prompts, responses):
            return plain_verdicts(np.linspace(0, 1, len(prompts)))

    out, model = tmp_path / "adapter", saved_model("llama3")
    monkeypatch.setattr("safelab.defenses.adaptive_judge.response_classifier", Classifier)
    monkeypatch.setattr("safelab.critics.ResponseClassifier", lambda *a: Classifier())
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path / "home"))
    code, text, err = run("train", *_options(data=pairs, model=model, out=out, defense="adaptive-judge"), "--quick", "--json")
    assert code == 0, err
    assert json.loads(text)["trained_with"] == "classifier" and json.loads(text)["critic_failures"] == {}

    arguments = _options(prompts=prompts, model=model, adapter=out, critic=judge, critic_model=model)
    code, text, err = run("evaluate", *arguments, "--json")
    assert code == 0, err
    result = json.loads(text)
    assert result["critics"]["same_critic"] is same and ("share a blind spot" in caplog.text) is same
    assert result["critics"]["trained_with"] == "classifier" and result["critics"]["evaluated_with"] == judge
    assert result["harmful"]["n"] == 3 and (judge == "patterns" or result["harmful"]["mean"] == pytest.approx(2 / 3))
    assert ("it is the critic that trained" in run("evaluate", *arguments)[1]) is same
    caplog.clear()
    _, text, _ = run("evaluate", *_options(prompts=prompts, model=model, critic=judge, critic_model=model), "--json")
    assert not json.loads(text)["critics"]["same_critic"] and not caplog.text  # the safe start was trained by nobody's critic


def _fails_half_way(error):
    def fine_tune(*args, output, **kwargs):
        (output / "adapter_model.safetensors").write_bytes(b"half")
        raise error

    return fine_tune


@pytest.mark.parametrize("error, said", [(RuntimeError("out of memory"), "safelab: out of memory"), (KeyboardInterrupt(), "with --resume")])
def test_a_training_that_ends_half_way_is_not_finished_and_can_go_on(tmp_path, pairs, saved_model, run, monkeypatch, error, said):
    out = tmp_path / "adapter"
    options = _options(data=pairs, model=saved_model("llama3"), out=out, defense="sft")
    with monkeypatch.context() as patch:
        patch.setattr("safelab.experiments.fine_tune", _fails_half_way(error))
        code, text, err = run("train", *options, "--quick")
    assert (code, text) == (1, "") and said in err
    assert not (out / "training.json").exists()

    code, _, err = run("train", *options, "--quick")
    assert code == 1 and "--resume" in err
    code, _, err = run("train", *options, "--quick", "--resume", "--learning-rate", 0.5)
    assert code == 1 and "learning_rate was 0.0002 and is 0.5" in err
    code, _, err = run("train", *options, "--quick", "--resume")
    assert code == 0, err
    code, text, _ = run("train", *options, "--quick", "--resume")
    assert code == 0 and "finished already" in text


def test_merged_the_result_is_a_whole_model(tmp_path, pairs, prompts, saved_model, run):
    out = tmp_path / "model"
    code, _, err = run("train", *_options(data=pairs, model=saved_model("llama3"), out=out, defense="sft"), "--quick", "--merge")
    assert code == 0, err
    assert not (out / "adapter_config.json").exists()
    code, _, err = run("evaluate", *_options(prompts=prompts, model=out))
    assert code == 0, err


@pytest.mark.parametrize(
    "more, said", [(["--critic", "patterns"], "asks no critic"), (["--stop-above", 0.05], "needs --measure-every"), (["--defense", "none"], "there are sft")]
)
def test_options_of_a_training_that_do_not_fit_are_refused(more, said, tmp_path, pairs, saved_model, run):
    code, _, err = run("train", *_options(data=pairs, model=saved_model("llama3"), out=tmp_path / "x", defense="sft"), *more)
    assert code == 1 and said in err and not (tmp_path / "x").exists()


def test_shared_weights_are_refused_before_any_training(tmp_path, pairs, saved_model, run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, _, err = run("train", *_options(data=pairs, model=saved_model("llama3"), out=tmp_path / "x", defense="sft"))
    assert code == 1 and "fsdp.yaml" in err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("asr, stops", [([0, 1], True), ([0, 0], False)])
def test_a_training_stops_on_its_safety_budget_and_says_so(asr, stops, tmp_path, pairs, saved_model, run, monkeypatch):
    """At the third step, where half of the harmful prompts are answered and a quarter may be."""
    from safelab.experiments import Suite

    monkeypatch.setattr(Suite, "measure", lambda *_: {"asr": asr, "over_refusal": [0], "utility": [1]})
    out = tmp_path / "out"
    options = _options(data=pairs, model=saved_model("llama3"), out=out, defense="sft", batch_size=1, epochs=3)
    code, text, err = run("train", *options, "--measure-every", 3, "--stop-above", 0.25)
    assert code == 0, err
    result = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert (result["history"][-1]["step"] == 3) == stops == ("stopped after step 3: asr 0.500 > 0.25" in text)
    assert result["measured"][0].items() >= {"step": 3, "asr": sum(asr) / 2, "over_refusal": 0.0, "utility": 1.0}.items()
    assert f"step 3: ASR {sum(asr) / 2:.2f}" in (out / "README.md").read_text(encoding="utf-8")


def test_bench_prints_its_table_and_its_json(run, monkeypatch):
    spread = {"median": 1.0, "q1": 0.9, "q3": 1.1, "n": 3}
    made_up = {
        "ratios": {"adaptive_cached/trl_sft": 0.5}, "medians": {"trl_sft": 2.0, "adaptive_cached": 1.0}, "spread": dict.fromkeys(("trl_sft", "adaptive_cached"), spread) | {"adaptive_cached/trl_sft": spread | {"median": 0.5}},
        "memory_mb": {"trl_sft": 3000}, "cache": {"seconds_per_example": 0.05, "paid_back_after_epochs": 0.5},
        "head": {"tokens": 8, "width": 4, "vocabulary": 100, "moments": {"seconds": 1.0, "extra_gb": 0.1}, "reference_states": {"seconds": 2.0, "extra_gb": 0.2}},
        "targets": {"adaptive_cached/trl_sft": 0.75}, "met": {"adaptive_cached/trl_sft": True},
    }  # fmt: skip
    monkeypatch.setattr("safelab.bench.run_bench", lambda **_: made_up)
    code, text, _ = run("bench", "--json")
    assert code == 0 and json.loads(text) == made_up
    _, text, _ = run("bench")
    assert "| trl_sft | 2.000 | 0.900 to 1.100 | 0.50, 0.90 to 1.10 | 3000 |" in text and "met: adaptive_cached/trl_sft <= 0.75" in text


def test_evaluate_counts_the_refusals_of_the_prompts_it_was_given(prompts, saved_model, run, monkeypatch):
    answers = {"Tell me about the city.": "I can't help with that."}
    monkeypatch.setattr("safelab.evaluation.generate", lambda model, tokenizer, given, **_: [answers.get(p, "Sure.") for p in given])
    code, text, _ = run("evaluate", *_options(prompts=prompts, model=saved_model("llama3")), "--json")
    assert code == 0 and json.loads(text)["prompts"] == str(prompts)
    assert json.loads(text)["refused"]["mean"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("quick, n", [(False, None), (True, 16)])
def test_evaluate_takes_the_judging_split_of_a_registered_set(saved_model, run, monkeypatch, quick, n):
    from safelab.datasets import load_prompts

    asked = []
    monkeypatch.setattr("safelab.evaluation.generate", lambda model, tokenizer, given, **_: asked.extend(given) or ["Sure."] * len(given))
    code, _, err = run("evaluate", *_options(prompts="everyday", model=saved_model("llama3")), *["--quick"] * quick)
    assert code == 0, err
    assert asked == list(load_prompts("everyday", "eval")["prompt"])[:n]


# ----------------------------------------------------------------------------------------- demo and lab


@pytest.fixture
def made_up_demo(monkeypatch):
    def run_demo(seeds, *, arms, quick, force):
        names, arms = arms, []
        for a, arm in enumerate(names):
            rate = {"mean": 0.2 * a, "lo": 0.2 * a, "hi": 0.2 * a + 0.1, "n": 10}
            rates = dict.fromkeys(("asr", "asr_strongreject", "over_refusal", "utility"), rate)
            arms.append({"arm": arm, **rates, "step_seconds": 1.25 if a else None, "peak_memory_mb": 1234})
        return {"arms": arms, "seeds": list(seeds), "attack": "made up", "model": "tiny", "quick": quick, "force": force}

    monkeypatch.setattr("safelab.experiments.run_demo", run_demo)


def test_demo_prints_what_it_writes(tmp_path, run, made_up_demo):
    code, text, err = run("demo", "--out", tmp_path / "new", "--seed", 0, "--seed", 2, "--quick", "--json")
    assert code == 0, err
    result = json.loads(text)
    assert result["seeds"] == [0, 2] and result["quick"] and not result["force"]
    written = json.loads((tmp_path / "new" / "demo.json").read_text(encoding="utf-8"))
    alt = written.pop("alt")
    assert written == result
    assert "sft: 20 % of harmful prompts answered, task accuracy 20 %." in alt
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["demo.json", "demo.png"]


def test_demo_with_a_judge_has_one_arm_more(tmp_path, run, made_up_demo):
    _, text, _ = run("demo", "--out", tmp_path, "--judge", "--json")
    assert [a["arm"] for a in json.loads(text)["arms"]] == [*DEMO_ARMS, "adaptive-judge"]


def test_demo_prints_a_markdown_table_and_where_the_files_are(tmp_path, run, made_up_demo):
    _, text, _ = run("demo", "--out", tmp_path)
    lines = text.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == list(DEMO_ARMS)
    assert len({line.count("|") for line in lines[:6]}) == 1
    assert lines[3] == "| sft |" + " 20 % [20, 30] |" * 4 + " 1.25 | 1,234 |"
    assert str(tmp_path / "demo.png") in text


def test_lab_becomes_jupyterlab_on_this_machine_only(run, monkeypatch):
    class Became(BaseException):
        pass

    def execv(program, command):
        raise Became(program, command)

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(Became) as became:
        run("lab", "--port", 9999, "--no-browser")
    program, command = became.value.args
    assert program == command[0] == sys.executable
    assert {"--ip=127.0.0.1", "--port=9999", "--no-browser", f"--ServerApp.root_dir={ROOT / 'notebooks'}"} <= set(command)
    assert not [word for word in command if "token" in word or "password" in word]  # the server's own, which are on
