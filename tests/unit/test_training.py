"""The trainer against plain references, TRL's own trainer and itself on two processes, on tiny random models of four families."""

import gc
import json
import math
import os
import socket
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from ddp_worker import CASES, EXAMPLES, dataset, make_trainer, trainable, update, update_of
from fsdp_worker import CASES as SHARDED
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from safelab.reference import SecondModel, output_head, response_logits, response_positions
from safelab.training import REFERENCES, AdaptiveSFTConfig, PairCollator, ProgressBar, StepClock, lora_config, tokenize_pairs

END = {"llama3": "<|eot_id|>", "qwen2": "<|im_end|>", "gemma3": "<end_of_turn>", "phi3": "<|end|>"}
RISKS = [risk for _, _, risk in EXAMPLES]


@pytest.fixture(scope="module")
def small_model(tiny_model):
    """``small_model(family, seed=0, **config_changes) -> model``: two layers, in Gemma one of each kind."""
    return partial(tiny_model, num_hidden_layers=2)


@pytest.fixture(params=list(END))
def name(request):
    """A family of models."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """References are kept in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFELAB_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """The libraries' many objects are left out of the collection that each training run starts: a quarter of a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ------------------------------------------------------------------------------- the plain reference


def plain_tokens(tokenizer, name):
    """(token ids, length of the prompt) of each example, from the chat template itself."""
    examples = []
    for prompt, response, _ in EXAMPLES:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        answer = tokenizer(response, add_special_tokens=False).input_ids
        examples.append((ids + answer + [tokenizer.convert_tokens_to_ids(END[name])], len(ids)))
    return examples


def plain_terms(model, reference, tokens):
    """NLL and KL of each response token, by example: one example at a time, unpadded, from all logits of the model."""
    terms = []
    for ids, prompt_length in tokens:
        row = torch.tensor([ids])
        log_p = model(input_ids=row).logits[0].double().log_softmax(-1)
        with torch.no_grad():
            log_ref = reference(input_ids=row).logits[0].double().log_softmax(-1)
        nll = torch.stack([-log_p[t - 1, ids[t]] for t in range(prompt_length, len(ids))])
        kl = torch.stack([(log_ref[t - 1].exp() * (log_ref[t - 1] - log_p[t - 1])).sum() for t in range(prompt_length, len(ids))])
        terms.append((nll, kl))
    return terms


def plain_loss(terms, betas):
    total = sum((1 - beta) * nll.sum() + beta * kl.sum() for (nll, kl), beta in zip(terms, betas, strict=True))
    return total / sum(len(nll) for nll, _ in terms)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def difference(ours, theirs):
    """The largest relative difference over tensors; both must have the same ones, and none of zeros."""
    assert ours.keys() == theirs.keys()
    return max(((ours[k] - theirs[k]).norm() / theirs[k].norm()).item() for k in theirs)


def lora(**changes):
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **changes)


def whole_batch(trainer):
    """All examples as the trainer prepares them for a step of one micro-batch."""
    (batch,), _ = trainer.get_batch_samples(iter([trainer.data_collator(list(trainer.train_dataset))]), 1, torch.device("cpu"))
    return batch


def history(trainer, *keys):
    return np.array([[row[key] for key in keys] for row in trainer.state.log_history if "nll" in row])


# ----------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_targets_are_the_response_and_its_end_of_turn(name, pad_is_end, tiny_tokenizer):
    """Also where padding and end of turn are one token: masked by token id, the end would never be learned."""
    tokenizer = tiny_tokenizer(name)
    if pad_is_end:
        tokenizer.pad_token = END[name]
    rows = tokenize_pairs(tokenizer, dataset())
    batch = PairCollator(tokenizer.pad_token_id)(list(rows))
    assert batch["risk"].tolist() == pytest.approx(RISKS)
    longest = max(len(ids) for ids, _ in plain_tokens(tokenizer, name))
    for row, (ids, prompt_length) in enumerate(plain_tokens(tokenizer, name)):
        padding = longest - len(ids)
        assert batch["input_ids"][row].tolist() == ids + [tokenizer.pad_token_id] * padding
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * padding
        assert batch["labels"][row].tolist() == [-100] * prompt_length + ids[prompt_length:] + [-100] * padding
        assert ids[-1] == tokenizer.convert_tokens_to_ids(END[name])


def test_too_long_a_pair_is_cut_at_the_end_of_its_response(name, tiny_tokenizer):
    tokenizer = tiny_tokenizer(name)
    (ids, prompt_length), *_ = plain_tokens(tokenizer, name)
    row = tokenize_pairs(tokenizer, dataset().select([0]), max_length=prompt_length + 3)[0]
    assert row["input_ids"] == ids[: prompt_length + 3]
    assert row["labels"] == [-100] * prompt_length + ids[prompt_length : prompt_length + 3]
    with pytest.raises(ValueError, match="leaves no room for a response"):
        tokenize_pairs(tokenizer, dataset().select([0]), max_length=prompt_length)


def test_the_end_of_turn_is_no_target_after_a_response_that_was_cut_off(name, tiny_tokenizer):
    rows = tokenize_pairs(tiny_tokenizer(name), dataset().add_column("complete", [True] * 7 + [False]))
    end = tiny_tokenizer(name).convert_tokens_to_ids(END[name])
    assert [row["labels"][-1] == end for row in rows] == [True] * 7 + [False]


def test_the_trainer_keeps_to_max_length(small_model, tiny_tokenizer, tmp_path):
    trainer = make_trainer(small_model("llama3"), tiny_tokenizer("llama3"), tmp_path, max_length=70)
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 70


# ------------------------------------------------------------------------------------ the objective


@pytest.mark.parametrize(
    ("granularity", "lowest", "risks", "betas"),
    [
        ("example", 0.1, RISKS, [0.1 + 0.8 * r for r in RISKS]),
        ("example", 0.0, RISKS, [0.9 * r for r in RISKS]),  # two examples are not held at all
        ("batch", 0.0, RISKS, [0.9 * sum(RISKS) / 8] * 8),
        # one harmful example among seven harmless ones
        ("example", 0.1, [0.0, 1.0] + [0.0] * 6, [0.1, 0.9] + [0.1] * 6),
        ("batch", 0.1, [0.0, 1.0] + [0.0] * 6, [0.2] * 8),
    ],
)
def test_loss_and_gradients_are_those_of_the_plain_reference(
    granularity, lowest, risks, betas, name, small_model, tiny_tokenizer, tmp_path
):
    """Eight examples of very different lengths and risks, padding the end-of-turn token, the adapter not zero."""
    tokenizer = tiny_tokenizer(name)
    tokenizer.pad_token = END[name]
    trainer = make_trainer(small_model(name).double(), tokenizer, tmp_path, data=dataset(risks), granularity=granularity, beta_min=lowest)
    loss = trainer.compute_loss(trainer.model.train(), whole_batch(trainer))
    expected = plain_loss(plain_terms(trainer.model, small_model(name).double(), plain_tokens(tokenizer, name)), betas)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert difference(gradients(trainer.model, loss), gradients(trainer.model, expected)) < 1e-6


def test_a_mean_over_examples_gives_a_short_answer_the_weight_of_a_long_one(name, small_model, tiny_tokenizer, tmp_path):
    trainer = make_trainer(small_model(name).double(), tiny_tokenizer(name), tmp_path, mean_over="example")
    loss = trainer.compute_loss(trainer.model.train(), whole_batch(trainer))
    terms = plain_terms(trainer.model, small_model(name).double(), plain_tokens(tiny_tokenizer(name), name))
    betas = [0.1 + 0.8 * r for r in RISKS]
    expected = sum((1 - beta) * nll.mean() + beta * kl.mean() for (nll, kl), beta in zip(terms, betas)) / len(terms)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() != pytest.approx(plain_loss(terms, betas).item(), rel=1e-2)
    assert difference(gradients(trainer.model, loss), gradients(trainer.model, expected)) < 1e-6


@pytest.mark.parametrize("granularity", ["example", "batch"])
@pytest.mark.parametrize("highest", [0.0, 0.9])
def test_anchors_are_held_and_teach_nothing(highest, granularity, small_model, tiny_tokenizer, tmp_path):
    """alpha 0 and beta 1, whatever the bounds; and the mean risk of a batch is that of the other examples."""
    anchors = [True, False, True] + [False] * 5
    data, tokenizer = dataset().add_column("anchor", anchors), tiny_tokenizer("llama3")
    settings = dict(beta_min=min(0.1, highest), beta_max=highest, granularity=granularity)
    trainer = make_trainer(small_model("llama3").double(), tokenizer, tmp_path, data=data, **settings)
    loss = trainer.compute_loss(trainer.model.train(), whole_batch(trainer))
    terms = plain_terms(trainer.model, small_model("llama3").double(), plain_tokens(tokenizer, "llama3"))
    free = [r for r, a in zip(RISKS, anchors) if not a]
    used = RISKS if granularity == "example" else [sum(free) / len(free)] * 8
    betas = [1.0 if a else min(0.1, highest) + (highest - min(0.1, highest)) * r for r, a in zip(used, anchors)]
    expected = plain_loss(terms, betas)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert difference(gradients(trainer.model, loss), gradients(trainer.model, expected)) < 1e-6


def test_full_fine_tuning_against_a_second_model(name, small_model, tiny_tokenizer, tmp_path):
    """Every weight has a gradient, and the reference none."""
    model, reference, tokenizer = small_model(name).double(), small_model(name, seed=1).double(), tiny_tokenizer(name)
    trainer = make_trainer(model, tokenizer, tmp_path, lora=False, reference="model", reference_model=reference)
    loss = trainer.compute_loss(model, whole_batch(trainer))
    expected = plain_loss(plain_terms(model, reference, plain_tokens(tokenizer, name)), [0.1 + 0.8 * r for r in RISKS])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    assert len(ours) == len(list(model.parameters()))
    norms = {k: g.norm().item() for k, g in theirs.items()}
    large = [k for k in norms if norms[k] > 1e-9 * max(norms.values())]  # a bias added to all keys changes no attention
    assert difference({k: ours[k] for k in large}, {k: theirs[k] for k in large}) < 1e-6
    assert not any(p.requires_grad or p.grad is not None for p in reference.parameters())


@pytest.mark.parametrize("kind", ["cached", "adapter-off"])
def test_the_reference_of_a_peft_model_is_the_model_without_its_adapter(kind, name, small_model, random_lora, tiny_tokenizer, tmp_path):
    """The adapter changes the outputs from the start; were it on while the reference is computed, the KL would be 0."""
    model, tokenizer = random_lora(small_model(name).double()), tiny_tokenizer(name)
    trainer = make_trainer(model, tokenizer, tmp_path, lora=False, random_b=False, reference=kind)
    with torch.no_grad():
        loss = trainer.compute_loss(model.train(), whole_batch(trainer))
        terms = plain_terms(model, small_model(name).double(), plain_tokens(tokenizer, name))
    assert loss.item() == pytest.approx(plain_loss(terms, [0.1 + 0.8 * r for r in RISKS]).item(), rel=1e-6)
    assert all(kl.mean() > 1e-3 for _, kl in terms)


@pytest.mark.parametrize("kind", ["auto", "adapter-off", "model"])
def test_the_reverse_kl_is_the_other_way_round(kind, name, small_model, random_lora, tiny_tokenizer, tmp_path):
    model, reference, tokenizer = random_lora(small_model(name).double()), small_model(name).double(), tiny_tokenizer(name)
    trainer = make_trainer(
        model, tokenizer, tmp_path, lora=False, random_b=False, kl_direction="reverse", beta_min=1.0, beta_max=1.0, reference=kind, reference_model=reference if kind == "model" else None
    )
    loss = trainer.compute_loss(model.train(), whole_batch(trainer))
    kls = []
    for ids, start in plain_tokens(tokenizer, name):
        ours, safe = (m(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1) for m in (model, reference))
        kls.append((ours.exp() * (ours - safe)).sum(-1))
    expected = torch.cat(kls).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and expected > 1e-3
    assert difference(gradients(model, loss), gradients(model, expected)) < 1e-6


def test_padding_contributes_nothing(name, small_model, tiny_tokenizer, tmp_path):
    trainer = make_trainer(small_model(name).double(), tiny_tokenizer(name), tmp_path)
    batch = whole_batch(trainer)
    padded = {k: torch.nn.functional.pad(batch[k], (0, 9), value=v) for k, v in [("input_ids", 0), ("attention_mask", 0), ("labels", -100)]}
    padded["input_ids"] = torch.where(padded["attention_mask"] == 1, padded["input_ids"], 77)  # other padding, and more
    losses = [trainer.compute_loss(trainer.model, b) for b in (batch, batch | padded)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    assert difference(gradients(trainer.model, losses[1]), gradients(trainer.model, losses[0])) < 1e-6


def test_gradients_flow_from_the_positions_before_response_tokens_only(name, small_model, tiny_tokenizer, tmp_path):
    trainer = make_trainer(small_model(name).double(), tiny_tokenizer(name), tmp_path)
    states = []
    trainer.model.get_base_model().model.norm.register_forward_hook(lambda _, __, out: states.append(out) or out.retain_grad())
    trainer.compute_loss(trainer.model, whole_batch(trainer)).backward()
    used = states[0].grad.abs().sum(-1) > 0
    for row, (ids, prompt_length) in enumerate(plain_tokens(tiny_tokenizer(name), name)):
        assert used[row].nonzero().flatten().tolist() == list(range(prompt_length - 1, len(ids) - 1))


def test_logged_signals_are_token_means(small_model, tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer("qwen2")
    trainer = make_trainer(small_model("qwen2").double(), tokenizer, tmp_path)
    with torch.no_grad():
        terms = plain_terms(trainer.model, small_model("qwen2").double(), plain_tokens(tokenizer, "qwen2"))
    trainer.train()
    betas = [0.1 + 0.8 * r for r in RISKS]
    means = [torch.cat([t[i] for t in terms]).mean().item() for i in (0, 1)]
    expected = [plain_loss(terms, betas).item(), *means, np.mean(RISKS), np.mean(betas)]
    assert history(trainer, "loss", "nll", "kl", "risk", "beta")[0] == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------- the reference policy


@pytest.mark.parametrize("adapter", [False, True])
def test_response_logits_are_the_models_own(adapter, name, small_model, tiny_tokenizer, random_lora):
    model = random_lora(small_model(name)) if adapter else small_model(name)
    batch = PairCollator(0)(list(tokenize_pairs(tiny_tokenizer(name), dataset())))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    mask, targets = response_positions(batch["labels"])
    expected = model(**inputs).logits[mask]
    torch.testing.assert_close(response_logits(model, inputs, mask), expected, rtol=1e-4, atol=1e-5)
    assert len(targets) == len(expected) == sum(len(ids) - n for ids, n in plain_tokens(tiny_tokenizer(name), name))
    assert targets.tolist() == [t for ids, n in plain_tokens(tiny_tokenizer(name), name) for t in ids[n:]]

    with pytest.raises(IndexError):
        response_logits(model, inputs, mask[:, 1:])
    assert "forward" not in vars(output_head(model))
    torch.testing.assert_close(model(**inputs).logits[mask], expected)  # whole again, after use and after an error


def test_the_three_references_agree(name, small_model, tiny_tokenizer, tmp_path):
    """KL 0 at step 0, then the same losses and the same weights, whatever batches the cache was made of."""
    runs = {}
    for kind in REFERENCES:
        trainer = make_trainer(
            small_model(name), tiny_tokenizer(name), tmp_path, reference=kind, reference_model=small_model(name),
            random_b=False, learning_rate=0.2, per_device_train_batch_size=3, beta_min=0.0,  # two examples are not held at all
        )  # fmt: skip
        change = update(trainer)
        runs[kind] = history(trainer, "loss", "nll", "kl"), change
        kl = runs[kind][0][:, 2]
        assert len(kl) == 3 and abs(kl[0]) < 1e-6 and (kl[1:] > 1e-3).all(), kind
    for kind in ("adapter-off", "model"):
        assert runs[kind][0] == pytest.approx(runs["cached"][0], rel=1e-4, abs=1e-6)
        assert difference(runs[kind][1], runs["cached"][1]) < 1e-4


@pytest.mark.parametrize("kind", REFERENCES)
def test_dropout_does_not_move_the_model_from_its_reference(kind, name, small_model, tiny_tokenizer, tmp_path):
    """With functional attention dropout, dropout modules or dropout in LoRA, the KL of a fresh adapter is still 0."""
    drops = dict(attention_dropout=0.5) | (dict(resid_pdrop=0.5, embd_pdrop=0.5) if name == "phi3" else {})
    reference = small_model(name, **drops).train()
    trainer = make_trainer(
        small_model(name, **drops), tiny_tokenizer(name), tmp_path, beta_min=1.0, beta_max=1.0,
        reference=kind, reference_model=reference, lora=lora(lora_dropout=0.5), random_b=False,
    )  # fmt: skip
    assert abs(trainer.compute_loss(trainer.model.train(), whole_batch(trainer)).item()) < 1e-6


def test_a_cap_on_the_logits_is_part_of_the_reference(small_model, tiny_tokenizer, tmp_path):
    """What a model does after its output head (soft-capping, scaling) is not in the cache: refused there, right otherwise."""

    def make(kind):
        model, reference = (small_model("gemma3", final_logit_softcapping=2.0) for _ in range(2))
        return make_trainer(
            model, tiny_tokenizer("gemma3"), tmp_path, beta_min=1.0, beta_max=1.0, reference=kind, reference_model=reference, random_b=False
        )

    for kind in ("adapter-off", "model"):
        trainer = make(kind)
        assert abs(trainer.compute_loss(trainer.model, whole_batch(trainer)).item()) < 1e-6
    with pytest.raises(ValueError, match="reference='adapter-off'"):
        make("cached")
    assert isinstance(make("auto").reference, SecondModel)


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
@pytest.mark.parametrize("kind", ["cached", "adapter-off"])
def test_gradient_checkpointing_changes_no_gradient(kind, family, small_model, tiny_tokenizer, tmp_path):
    """Activations are computed again in the backward pass, when the hooks are gone and the adapter is on again."""
    changes, passes = [], []
    for checkpointing in (False, True):
        trainer = make_trainer(
            small_model(family).double(), tiny_tokenizer(family), tmp_path, reference=kind, gradient_checkpointing=checkpointing
        )
        passes.append(0)
        trainer.model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.__setitem__(-1, passes[-1] + 1))
        changes.append(update(trainer))
    assert passes[1] == passes[0] + 1
    assert difference(changes[1], changes[0]) < 1e-6


# ------------------------------------------------------------- micro-batches, accumulation, processes


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_model, tiny_tokenizer):
    """A folder with the models that the two-process tests load."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("llama3", small_model("llama3")), ("gemma3", small_model("gemma3")), ("tied", small_model("llama3", tie_word_embeddings=True))):
        model.save_pretrained(folder / name)
        tiny_tokenizer("gemma3" if name == "gemma3" else "llama3").save_pretrained(folder / name)
    return folder


def on_two_processes(worker, models, output):
    """What each of two real processes over gloo found, with half of every batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name(worker)), str(models), str(output)]
    workers, logs = [], [output / "log0", output / "log1"]
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                workers.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
        codes = [worker.wait(timeout=300) for worker in workers]
    except subprocess.TimeoutExpired:
        codes = ["a process waits for the other"]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert codes == [0, 0], "\n\n".join(log.read_text()[-2000:] for log in logs)
    return [torch.load(output / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def two_processes(models, tmp_path_factory):
    """Updates by case, from processes that have the whole model each."""
    return on_two_processes("ddp_worker.py", models, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def sharded(models, tmp_path_factory):
    """The folder and the updates by case of processes that share the weights (FSDP2)."""
    output = tmp_path_factory.mktemp("sharded")
    return output, on_two_processes("fsdp_worker.py", models, output)


@pytest.fixture(scope="module")
def one_batch(models, tmp_path_factory):
    """``one_batch(case)``: the update from all eight examples at once."""
    return cache(lambda case: update_of(case, models, tmp_path_factory.mktemp("one")))


@pytest.mark.parametrize("case", [*CASES, "accumulated"])
def test_two_processes_make_the_same_update_as_one(case, two_processes, one_batch):
    expected = one_batch("llama3" if case == "accumulated" else case)
    for process in two_processes:
        assert difference(process[case], expected) < 1e-5


@pytest.mark.parametrize("case", [*SHARDED, "accumulated"])
def test_two_processes_that_share_the_weights_make_the_same_update_as_one(case, sharded, one_batch):
    expected = one_batch("llama3" if case == "accumulated" else case)
    for process in sharded[1]:
        assert difference(process[case], expected) < 1e-5


def test_a_run_with_shared_weights_can_go_on_and_saves_an_ordinary_adapter(sharded, models):
    folder, (first, second) = sharded
    for process in (first, second):
        assert difference(process["resumed"], process["whole"]) < 1e-6
        assert difference(process["whole"], first["whole"]) == 0
    saved = folder / "run" / "saved"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "llama3", dtype=torch.float64), saved, is_trainable=True)
    assert difference(trainable(model), first["whole"]) < 1e-6
    assert not list(folder.rglob("training_args.bin"))


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("gemma3", "tied")])
@pytest.mark.parametrize(("size", "steps"), [(1, 8), (3, 3)])
def test_accumulated_micro_batches_make_the_same_update_as_one_batch(case, size, steps, one_batch, models, tmp_path):
    accumulated = update_of(case, models, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    assert difference(accumulated, one_batch(case)) < 1e-5


def test_sorting_by_length_within_a_step_changes_no_update(one_batch, models, tmp_path):
    """transformers' own sampler: it decides which examples are padded together, and the step is a mean over all of them."""
    grouped = dict(train_sampling_strategy="group_by_length", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert difference(update_of("llama3", models, tmp_path, **grouped), one_batch("llama3")) < 1e-5


# --------------------------------------------------------------------------------- whole trajectories

STEPS = dict(
    optim="adamw_torch", learning_rate=5e-3, lr_scheduler_type="linear", max_grad_norm=1.0, num_train_epochs=3, seed=7,
    per_device_train_batch_size=2, gradient_accumulation_steps=3,
)  # fmt: skip


def test_beta_zero_is_trls_own_fine_tuning(name, small_model, tiny_tokenizer, tmp_path):
    """Same seed, data and adapter: the same losses and weights as SFTTrainer, through clipping and a short last batch."""
    ours = make_trainer(small_model(name), tiny_tokenizer(name), tmp_path, beta_min=0.0, beta_max=0.0, random_b=False, **STEPS)
    ours.train()

    tokenizer = tiny_tokenizer(name)
    if name == "llama3":  # nothing follows the end of turn in its template, so TRL can do it all from the messages
        rows = [{"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": r}]} for p, r, _ in EXAMPLES]
    else:
        rows = [{"input_ids": ids, "labels": [-100] * n + ids[n:]} for ids, n in plain_tokens(tokenizer, name)]
    quiet = dict(report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1)
    theirs = SFTTrainer(
        small_model(name),
        SFTConfig(output_dir=str(tmp_path), bf16=False, gradient_checkpointing=False, **quiet, **STEPS),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(4, 8),
    )
    theirs.train()
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (ours, theirs)]
    assert len(losses[1]) == 6 and all(p.abs().max() > 5e-3 for n, p in theirs.model.named_parameters() if "lora_B" in n)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert difference(trainable(ours.model), trainable(theirs.model)) < 1e-3


def test_beta_one_leaves_the_model_where_it_was(name, small_model, tiny_tokenizer, tmp_path):
    moved = {}
    for beta in (1.0, 0.9):
        trainer = make_trainer(
            small_model(name), tiny_tokenizer(name), tmp_path, beta_min=beta, beta_max=beta, random_b=False, per_device_train_batch_size=3
        )
        trainer.train()
        moved[beta] = max(p.abs().max().item() for n, p in trainer.model.named_parameters() if "lora_B" in n)
        if beta == 1.0:
            assert np.abs(history(trainer, "loss", "kl")).max() < 1e-6
            ids = torch.arange(20)[None]
            torch.testing.assert_close(trainer.model(input_ids=ids).logits, small_model(name)(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert moved[1.0] < 1e-5 < 1e-2 < moved[0.9]


KEPT = Path(__file__).parent / "reference" / "trajectory.json"


def test_a_kept_trajectory_is_met_again(name, small_model, tiny_tokenizer, tmp_path):
    """Per-step loss, nll and kl of a small adaptive run with AdamW, as they were when the trainer was found right.

    After an intended change make them again, and look at the difference:
    ``REMAKE_REFERENCE=1 python -m pytest tests/unit/test_training.py -k kept_trajectory``.
    """
    trainer = make_trainer(small_model(name).double(), tiny_tokenizer(name), tmp_path, random_b=False, **STEPS)
    trainer.train()
    rows = history(trainer, "loss", "nll", "kl")
    if os.environ.get("REMAKE_REFERENCE"):
        kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
        kept[name] = [dict(zip(("loss", "nll", "kl"), (float(f"{x:.7g}") for x in row), strict=True)) for row in rows]
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    kept = json.loads(KEPT.read_text(encoding="utf-8"))[name]
    assert rows == pytest.approx(np.array([[row[k] for k in ("loss", "nll", "kl")] for row in kept]), rel=1e-4, abs=1e-7)
    assert rows[-1, 2] > 1e-3


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(packing=True), "packing"),
        (dict(padding_free=True), "padding_free"),
        (dict(beta_min=0.9, beta_max=0.1), "beta_min <= beta_max"),
        (dict(beta_max=1.5), "beta_min <= beta_max"),
        (dict(reference="frozen"), "'frozen'.*auto, cached, adapter-off, model"),
        (dict(kl_direction="sideways"), "'sideways'.*'forward' or 'reverse'"),
        (dict(granularity="sentence"), "'sentence'.*example, token, batch"),
        (dict(schedule_kind="cubic"), "'cubic'.*linear, clamp, threshold"),
        (dict(risk_smoothing=0.9), "smoothing runs over steps"),
        (dict(save_total_limit=1), "2 or more"),
        (dict(fp16=True), "fp16 needs a GPU"),
    ],
)
def test_bad_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        AdaptiveSFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


class FixedCritic:
    name = "fixed"

    def __init__(self, risks):
        self.risks, self.calls = risks, []

    def score(self, prompts, responses):
        self.calls.append((prompts, responses))
        return np.array(self.risks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(reference="model"), "give reference_model"),
        (dict(lora=False), "give reference_model"),
        (dict(lora=False, reference="cached"), "'cached' needs LoRA"),
        (dict(lora=False, reference="adapter-off"), "'adapter-off' needs LoRA"),
        (dict(lora=lora(bias="all")), "bias='none'"),
        (dict(lora=lora(bias="lora_only"), reference="adapter-off"), "bias='none'"),
        (dict(lora=lora(modules_to_save=["lm_head"]), reference="cached"), "frozen output head"),
        (dict(kl_direction="reverse", reference="cached"), "forward KL.*adapter-off"),
        (dict(granularity="token"), "a list of risks"),
        (dict(data=dataset().remove_columns("risk")), "critic or a 'risk' column"),
        (dict(data=dataset().remove_columns("response")), "no column response"),
        (dict(data=dataset().remove_columns("prompt")), "no column prompt"),
        (dict(data=dataset().remove_columns("response"), critic=FixedCritic(RISKS)), "no column response"),
        (dict(critic=FixedCritic(RISKS[:3])), "3 risks for 8 examples"),
        *[
            (dict(data=dataset([0.5] * 7 + [risk]), **how), r"risk 7 is .*\[0, 1\]")
            for risk in (1.01, -0.01, math.nan, None)
            for how in ({}, dict(reference="adapter-off"), dict(beta_min=0.0, beta_max=0.0), dict(granularity="batch"))
        ],
        (dict(critic=FixedCritic([0.5] * 7 + [1.01])), r"risk 7 is .*\[0, 1\]"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(changes, message, small_model, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(small_model("llama3", num_hidden_layers=1), tiny_tokenizer("llama3"), tmp_path, **changes)


def test_without_an_adaptive_schedule_no_risk_is_needed(small_model, tiny_tokenizer, tmp_path):
    data = dataset().remove_columns("risk")
    trainer = make_trainer(small_model("llama3"), tiny_tokenizer("llama3"), tmp_path, data=data, beta_min=0.5, beta_max=0.5)
    assert math.isfinite(trainer.compute_loss(trainer.model, whole_batch(trainer)).item())


def test_a_critic_scores_each_example_once_and_outweighs_a_risk_column(small_model, tiny_tokenizer, tmp_path):
    critic = FixedCritic(RISKS[::-1])
    trainer = make_trainer(small_model("llama3"), tiny_tokenizer("llama3"), tmp_path, critic=critic, num_train_epochs=2)
    trainer.train()
    assert critic.calls == [([p for p, _, _ in EXAMPLES], [r for _, r, _ in EXAMPLES])]
    assert whole_batch(trainer)["risk"].tolist() == pytest.approx(RISKS[::-1])


# ------------------------------------------------------------------------------------- around it


def test_nothing_is_printed_to_stdout_and_every_step_is_timed(small_model, tiny_tokenizer, tmp_path, capsys):
    clock = StepClock()
    trainer = make_trainer(
        small_model("llama3"), tiny_tokenizer("llama3"), tmp_path, per_device_train_batch_size=2, callbacks=[clock, ProgressBar("testing")]
    )
    trainer.train()
    printed = capsys.readouterr()
    assert printed.out == "" and "testing" in printed.err
    assert len(clock.seconds) == 4 and min(clock.seconds) > 0


@pytest.mark.parametrize(("seconds", "median"), [([9, 9, 1, 3, 2], 2), ([9, 8, 1], 1), ([4], 4)])
def test_the_first_two_steps_are_left_out_of_the_median(seconds, median):
    clock = StepClock()
    clock.seconds = seconds
    assert clock.median() == median
