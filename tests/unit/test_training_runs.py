"""Whole runs of the trainer: the risk of a step, signals, monitors, checkpoints, precision, the cached reference, what is saved."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from ddp_worker import EXAMPLES, dataset, make_trainer, trainable, update
from resume_worker import SETTINGS, run
from safetensors.torch import load_file
from transformers import TrainerCallback

from safelab.attention import NAME
from safelab.models import render_pairs
from safelab.output import DONE, save_result
from safelab.reference import AdapterOff, CachedMoments, SecondModel, in_batches, response_logits, response_positions
from safelab.training import MARKER, SafetyMonitor, is_complete, latest_checkpoint

RISKS = [risk for _, _, risk in EXAMPLES]


@pytest.fixture(scope="module")
def small_model(tiny_model):
    return partial(tiny_model, num_hidden_layers=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """References are kept in a folder of the test."""
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path / "home"))


@pytest.fixture
def make(small_model, tiny_tokenizer, tmp_path):
    """``make(**settings)``: a trainer on the Llama."""
    return lambda **settings: make_trainer(small_model("llama3"), tiny_tokenizer("llama3"), tmp_path / "run", **settings)


def difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(((ours[k] - theirs[k]).norm() / theirs[k].norm()).item() for k in theirs)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------ the risk of a step


@pytest.mark.parametrize(("granularity", "pool"), [("batch", np.mean), ("batch-max", np.max)])
def test_the_risk_of_a_step_is_that_of_all_its_micro_batches_and_is_smoothed_over_steps(granularity, pool, make, tmp_path):
    file = tmp_path / "signals.jsonl"
    trainer = make(
        granularity=granularity, risk_smoothing=0.75, per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=2,
        signals_file=str(file),
    )  # fmt: skip
    trainer.train()
    smoothed = None
    for step in range(1, 5):
        rows = [line for line in lines(file) if line["step"] == step]
        raw = pool([RISKS[row["index"]] for row in rows])
        smoothed = raw if smoothed is None else 0.75 * smoothed + 0.25 * raw
        assert len(rows) == 4 and {round(row["risk"], 5) for row in rows} == {round(smoothed, 5)}
        assert [row["beta"] for row in rows] == pytest.approx([0.1 + 0.8 * smoothed] * 4, abs=1e-5)


# ------------------------------------------------------------------------------------------ risk by token


def by_token(tokenizer, change=lambda risks: risks):
    """The examples with a risk for each response token, rising from 0 to the example's."""
    pairs = render_pairs(tokenizer, *zip(*[(p, r) for p, r, _ in EXAMPLES]), complete=[False] * 8)
    risks = [np.linspace(0, risk, len(pair.input_ids) - pair.prompt_length).tolist() for pair, (_, _, risk) in zip(pairs, EXAMPLES)]
    return Dataset.from_list([{"prompt": p, "response": r, "risk": change(risk)} for (p, r, _), risk in zip(EXAMPLES, risks)])


def test_each_token_is_weighed_by_its_own_risk(small_model, tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer("llama3")
    data = by_token(tokenizer)
    trainer = make_trainer(small_model("llama3").double(), tokenizer, tmp_path, data=data, granularity="token")
    batch = trainer.data_collator(list(trainer.train_dataset))
    mask, targets = response_positions(batch["labels"])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        log_p = response_logits(trainer.model, inputs, mask).log_softmax(-1)
        log_ref = response_logits(small_model("llama3").double(), inputs, mask).log_softmax(-1)
    risk = torch.tensor([r for row in data["risk"] for r in [*row, row[-1]]])  # the end of turn has the last token's
    beta = 0.1 + 0.8 * risk
    nll, kl = -log_p.gather(1, targets[:, None])[:, 0], (log_ref.exp() * (log_ref - log_p)).sum(-1)
    assert loss.item() == pytest.approx(((1 - beta) * nll + beta * kl).mean().item(), rel=1e-6)


@pytest.mark.parametrize("change", [lambda r: r[:-1], lambda r: [*r, 0.1], lambda r: []])
def test_risks_that_do_not_match_the_tokens_are_refused(change, small_model, tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer("llama3")
    with pytest.raises(ValueError, match=r"example 0 has \d+ risks for \d+ response tokens"):
        make_trainer(small_model("llama3"), tokenizer, tmp_path, data=by_token(tokenizer, change), granularity="token")
    with pytest.raises(ValueError, match="granularity 'example' needs one risk"):
        make_trainer(small_model("llama3"), tokenizer, tmp_path, data=by_token(tokenizer))


# ------------------------------------------------------------------------------------------ rounds of anchors


def test_each_epoch_shows_the_next_few_anchors_and_all_other_examples(make, tmp_path):
    """Five anchors, two of them an epoch: after three epochs all have been seen, and the first again."""
    file = tmp_path / "signals.jsonl"
    data = dataset().add_column("anchor", [True, False, True, True, False, True, False, True])
    trainer = make(signals_file=str(file), per_device_train_batch_size=5, num_train_epochs=3, anchor_share=0.67, data=data)
    trainer.train()
    assert trainer.state.global_step == 3
    epochs = [[row["index"] for row in lines(file) if row["step"] == step] for step in (1, 2, 3)]
    assert all(sorted(i for i in epoch if i in (1, 4, 6)) == [1, 4, 6] and len(epoch) == 5 for epoch in epochs)
    shown = [{i for i in epoch} - {1, 4, 6} for epoch in epochs]
    assert shown[0] | shown[1] | shown[2] == {0, 2, 3, 5, 7} and not shown[0] & shown[1] and not shown[1] & shown[2] and len(shown[2] & shown[0]) == 1
    assert len({tuple(e) for e in epochs}) == 3


def test_where_all_anchors_fit_an_epoch_the_order_is_the_trainers_own(make):
    data = dataset().add_column("anchor", [True, False] * 4)
    assert type(make(anchor_share=1.0, data=data)._get_train_sampler()) is type(make(data=data)._get_train_sampler()) is torch.utils.data.RandomSampler


# --------------------------------------------------------------------------------------------- what is seen


def test_each_example_and_step_has_a_line_of_signals(make, tmp_path):
    file = tmp_path / "signals.jsonl"
    trainer = make(signals_file=str(file), per_device_train_batch_size=3, num_train_epochs=2, data=dataset().add_column("anchor", [True] + [False] * 7))
    trainer.train()
    rows = lines(file)
    assert sorted((row["step"] > 3, row["index"]) for row in rows) == [(epoch, i) for epoch in (False, True) for i in range(8)]
    assert all(set(row) == {"step", "index", "anchor", "tokens", "nll", "kl", "risk", "alpha", "beta"} for row in rows)
    for row in rows:
        expected = 1.0 if row["index"] == 0 else 0.1 + 0.8 * RISKS[row["index"]]
        assert row["beta"] == pytest.approx(expected, abs=1e-5) and row["alpha"] == pytest.approx(1 - expected, abs=1e-5)
    for log in (h for h in trainer.state.log_history if "nll" in h):
        of_step = [row for row in rows if row["step"] == log["step"]]
        tokens = np.array([row["tokens"] for row in of_step])
        free = np.array([not row["anchor"] for row in of_step])
        nll, kl, risk = (np.array([row[k] for row in of_step]) for k in ("nll", "kl", "risk"))
        assert log["kl"] == pytest.approx(np.average(kl, weights=tokens), abs=1e-5)
        assert log["nll"] == pytest.approx(np.average(nll[free], weights=tokens[free]), abs=1e-5)
        assert log["risk"] == pytest.approx(risk[free].mean(), abs=1e-5)


class Reporter(TrainerCallback):
    """What every ``report_to`` backend is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def test_a_monitor_logs_what_it_measures_and_stops_on_its_budget(make):
    trainer, asked = make(per_device_train_batch_size=1), []

    def measure(model):
        asked.append(model)
        return {"asr": 0.02 * len(asked), "utility": 0.5}

    monitor = SafetyMonitor(trainer, measure, every=2, stop_above={"asr": 0.05})
    reporter = Reporter()
    trainer.add_callback(reporter)
    trainer.add_callback(monitor)
    trainer.train()
    assert trainer.state.global_step == 6 and len(asked) == 3
    assert [(h["step"], h["asr"], h["utility"]) for h in trainer.state.log_history if "asr" in h] == [(2, 0.02, 0.5), (4, 0.04, 0.5), (6, 0.06, 0.5)]
    assert monitor.stopped == "stopped after step 6: asr 0.060 > 0.05"
    seen = [(step, logs["asr"]) for step, logs in reporter.logs if "asr" in logs]
    assert seen == [(2, 0.02), (4, 0.04), (6, 0.06)]
    signals = [step for step, logs in reporter.logs if {"loss", "nll", "kl", "risk", "alpha", "beta"} <= set(logs)]
    assert signals == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def folder(small_model, tiny_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_model("llama3").save_pretrained(path)
    tiny_tokenizer("llama3").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """Weights and signals of a run of twelve steps that nothing interrupted."""
    output = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFELAB_HOME", str(output / "home"))
        weights = trainable(run(folder, output).model)
    return weights, lines(output / "signals.jsonl")


@pytest.mark.parametrize("step", [1, 5, 12])  # before the first checkpoint, between two, before the last
def test_a_run_that_was_killed_ends_as_if_nothing_had_happened(step, folder, undisturbed, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("resume_worker.py")), str(folder), str(tmp_path)]
    killed = subprocess.run([*command, str(step)], env=environment, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr[-2000:]
    resumed = run(folder, tmp_path)
    assert resumed.state.global_step == 12
    assert difference(trainable(resumed.model), undisturbed[0]) < 1e-6
    found, expected = lines(tmp_path / "signals.jsonl"), undisturbed[1]
    assert [(row["step"], row["index"]) for row in found] == [(row["step"], row["index"]) for row in expected]
    for row, other in zip(found, expected):
        assert row == pytest.approx(other, abs=2e-6)  # two processes may round the sixth decimal differently


class Stop(TrainerCallback):
    """An error at a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.fixture
def stopped(folder, tmp_path):
    """The folder of a run that was interrupted after step 7: checkpoints 4 and 6."""
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path, Stop())
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    return tmp_path


@pytest.mark.parametrize("file", [MARKER, "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_checkpoint_that_was_cut_short_is_skipped(damage, file, stopped):
    path = stopped / "checkpoint-6" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert latest_checkpoint(stopped) == stopped / "checkpoint-4"


def test_going_on_from_the_checkpoint_before_gives_the_same_weights(folder, stopped, undisturbed):
    (stopped / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    assert difference(trainable(run(folder, stopped).model), undisturbed[0]) < 1e-6


def test_a_checkpoint_holds_no_pickle_of_ours_and_is_read_as_data(folder, stopped, monkeypatch):
    """The optimiser's and generators' states are .pt files, which the parent loads with weights_only: no code in them can run."""
    assert not list(stopped.rglob("training_args.bin"))
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: loads.append(kwargs.get("weights_only")) or load(*args, **kwargs))
    run(folder, stopped)
    assert loads and all(only is True for only in loads)


def test_going_on_from_a_damaged_checkpoint_by_name_is_refused(make, stopped):
    (stopped / "checkpoint-6" / MARKER).unlink()
    assert not is_complete(stopped / "checkpoint-6")
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        make(**SETTINGS).train(resume_from_checkpoint=stopped / "checkpoint-6")


# --------------------------------------------------------------------------------- precision and memory


@pytest.mark.parametrize("reference", ["cached", "adapter-off"])
@pytest.mark.parametrize("settings", [dict(bf16=True), dict(bf16=True, gradient_checkpointing=True)])
def test_half_precision_follows_single_precision(settings, reference, make):
    steps = dict(SETTINGS, save_strategy="no", granularity="example", risk_smoothing=0.0, reference=reference)
    runs = []
    for changes in ({}, settings):
        trainer = make(**steps, **changes)
        trainer.train()
        runs.append([h["loss"] for h in trainer.state.log_history if "nll" in h])
    assert runs[1] == pytest.approx(runs[0], rel=0.05)
    assert runs[1] != runs[0]


@pytest.mark.parametrize("reference", ["cached", "adapter-off"])
def test_the_memory_of_the_loss_changes_no_update(reference, make):
    updates = [update(make(reference=reference, loss_memory=memory)) for memory in (256, 0.02)]
    assert difference(*updates) < 1e-5


@pytest.mark.parametrize("settings", [dict(bf16=True), dict(gradient_checkpointing=True), {}])
def test_full_fine_tuning(settings, small_model, tiny_tokenizer, tmp_path):
    model = small_model("llama3", tie_word_embeddings=True)
    trainer = make_trainer(
        model, tiny_tokenizer("llama3"), tmp_path, lora=False, reference_model=small_model("llama3", tie_word_embeddings=True), learning_rate=0.01, **settings
    )
    assert isinstance(trainer.reference, SecondModel)
    moved = update(trainer)
    assert len(moved) == len(list(model.parameters())) and all(change.abs().max() > 0 for change in moved.values())


# ---------------------------------------------------------------------------------- the cached reference


def count_passes(trainer):
    passes = []
    trainer.model.get_base_model().model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def cached_files(tmp_path):
    return sorted((tmp_path / "home" / "references").glob("*.safetensors"))


def test_the_reference_is_made_once_for_a_model_and_its_examples(make, tmp_path, monkeypatch):
    import safelab.training

    made, fill = [], safelab.training.fill_moments
    monkeypatch.setattr(safelab.training, "fill_moments", lambda *args, **kwargs: made.append(1) or fill(*args, **kwargs))
    first = make()
    assert isinstance(first.reference, CachedMoments) and len(made) == len(cached_files(tmp_path)) == 1
    again = make(beta_min=0.5, beta_max=0.5)  # another arm on the same data
    assert len(made) == 1 and np.array_equal(again.reference.values, first.reference.values)
    make(max_length=80)
    make(bf16=True)
    assert len(made) == len(cached_files(tmp_path)) == 3


def test_a_broken_file_is_made_again(make, tmp_path):
    values = np.array(make().reference.values)
    (file,) = cached_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    assert np.array_equal(make().reference.values, values)


def test_beyond_its_budget_the_adapter_is_turned_off_instead(make, tmp_path):
    assert isinstance(make(cache_budget=1e-6).reference, AdapterOff)
    assert isinstance(make(cache_budget=1e-6, reference="cached").reference, CachedMoments)


# ------------------------------------------------------------------------------------------ what is saved


def result(trainer):
    about = dict(defense="adaptive-probe", critic=None, model="/somewhere/private/tiny", data="abc", examples=8, seed=0, options={"epochs": 1}, versions={"torch": "2"})
    return about | {"history": [{"step": h["step"], "nll": h["nll"]} for h in trainer.state.log_history if "nll" in h]}


LOAD = """
import json, sys
try:
    import safelab.models
    sys.exit("safelab is here")
except ModuleNotFoundError:
    pass
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, base, ids = sys.argv[1:]
if base:
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder)
assert AutoTokenizer.from_pretrained(folder).chat_template
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor([json.loads(ids)])).logits.tolist()))
"""
"""A program of somebody who has transformers and peft, and no safelab."""


def without_safelab(folder: Path, base: Path | str, ids: list[int]) -> torch.Tensor:
    """The logits there: an interpreter that reads the installed packages but no .pth file, by which this project is on the path."""
    packages = Path(torch.__file__).parents[1]
    program = f"import sys; sys.path.append({str(packages)!r})\n{LOAD}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", program, str(folder), str(base), json.dumps(ids)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(json.loads(done.stdout))


@pytest.mark.parametrize("merge", [False, True])
def test_what_is_saved_loads_without_safelab(merge, make, folder, tmp_path):
    trainer, out = make(learning_rate=0.1), tmp_path / "out"
    trainer.train()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
    (out / "checkpoint-2").mkdir(parents=True)
    saved = save_result(trainer.model, trainer.processing_class, out, result(trainer), merge=merge)
    assert json.loads((out / DONE).read_text(encoding="utf-8")) == saved and not list(out.glob("checkpoint-*"))
    torch.testing.assert_close(without_safelab(out, "" if merge else folder, ids[0].tolist()), expected, rtol=1e-4, atol=1e-5)
    if merge:  # inference costs what it did: the same weights by name, shape and type in the same architecture
        shapes = [{name: (w.shape, w.dtype) for name, w in load_file(path / "model.safetensors").items()} for path in (out, folder)]
        configs = [json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (out, folder)]
        assert shapes[0] == shapes[1] and configs[0]["architectures"] == configs[1]["architectures"]
    card = (out / "README.md").read_text(encoding="utf-8")
    (weights,) = load_file(next(out.glob("*.safetensors"))) and saved["weights"].items()
    for said in ("adaptive-probe", "abc, 8 examples", "torch 2", weights[1][:16], "merge" if merge else "PeftModel"):
        assert said in card or said == "merge"
    assert "| start | tiny |" in card and "/somewhere" not in card
    assert not list(out.rglob("*.bin"))


# ------------------------------------------------------------------------------------- batches of the one pass


def test_batches_of_the_one_pass_are_sorted_and_bounded_and_lose_nothing():
    lengths = [3, 900, 5, 1300, 4, 2500, 600, 5]  # the longest is more than a batch may have, and comes alone
    rows = [{"input_ids": [0] * n, "index": i} for i, n in enumerate(lengths)]
    batches = list(in_batches(rows, "cpu"))
    assert sorted(row["index"] for batch in batches for row in batch) == list(range(8))
    assert [[len(row["input_ids"]) for row in batch] for batch in batches] == [[3, 4, 5, 5], [600, 900], [1300], [2500]]
    assert len(list(in_batches(rows[:5], "cuda"))) == 1 and not list(in_batches([], "cpu"))


# ------------------------------------------------------------------------------------- weights cast once


@pytest.mark.parametrize("reference", ["cached", "model"])
def test_frozen_weights_cast_once_train_the_same_adapter_and_come_back(reference, small_model, tiny_tokenizer, tmp_path):
    """To the bit what autocast does with its own casts, while a callback sees that they were not needed."""
    def trained(cast_once: bool):
        model = small_model("llama3")
        trainer = make_trainer(model, tiny_tokenizer("llama3"), tmp_path, bf16=True, reference=reference, reference_model=small_model("llama3") if reference == "model" else None, num_train_epochs=2)
        if not cast_once:
            trainer.frozen_in_half = nullcontext
        seen, attention = [], set()
        of = [trainer.model, *([trainer.reference.reference] if reference == "model" else [])]
        before = [{n: p for n, p in m.named_parameters()} for m in of]

        class Look(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                attention.add(model.config._attn_implementation)
                seen.append({p.dtype for m in of for n, p in m.named_parameters() if n.endswith("proj.weight") or "base_layer" in n})

        trainer.add_callback(Look())
        trainer.train()
        assert attention == {NAME} and model.config._attn_implementation == "sdpa"
        assert seen and set.union(*seen) == {torch.bfloat16 if cast_once else torch.float32}
        assert all(dict(m.named_parameters())[n] is p for m, names in zip(of, before) for n, p in names.items())
        return trainable(trainer.model)

    ours, theirs = trained(True), trained(False)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_frozen_weights_come_back_when_training_breaks_off(make):
    trainer = make(bf16=True)
    before = dict(trainer.model.named_parameters())

    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(p is before[n] for n, p in trainer.model.named_parameters())
