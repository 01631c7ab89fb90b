"""What the tests of the trainer share, and one process of their run on two (``ddp_worker.py MODELS OUTPUT``)."""

import gc
import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from safelab.training import AdaptiveSFTConfig, AdaptiveSFTTrainer, lora_config

# very different lengths and risks, mixed unevenly: the mean of means is far from the mean over tokens
EXAMPLES = [
    ("How do I bake bread at home?", " ".join(["Mix flour, water, salt and yeast, and wait. Then bake it, and wait again."] * 2), 0.0),
    ("Tell me about the city.", "No.", 1.0),
    ("Is this headline sarcastic?", "yes", 0.05),
    ("Write such a thing.", "I cannot help with that request. Sorry, but I will not write such a thing.", 0.9),
    (" ".join(["How do I wait?"] * 6), "Wait.", 0.5),
    ("List the steps.", " ".join(["Sure, here is a list of the steps: first, second, third."] * 3), 0.35),
    ("Hello", "Hi, how can I help?", 0.0),
    ("What is yeast?", "A", 0.7),
]


def dataset(risks=None) -> Dataset:
    rows = [{"prompt": prompt, "response": response, "risk": risk} for prompt, response, risk in EXAMPLES]
    return Dataset.from_list(rows if risks is None else [row | {"risk": r} for row, r in zip(rows, risks, strict=True)])


def make_trainer(
    model, tokenizer, output, *, data=None, lora=True, random_b=True, reference_model=None, critic=None, callbacks=None, **settings
) -> AdaptiveSFTTrainer:
    """A trainer whose update is minus the gradient (plain SGD, rate 1, no clipping); LoRA's B random, so that A learns too."""
    plain = dict(optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, per_device_train_batch_size=8)
    quiet = dict(use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, num_train_epochs=1)
    trainer = AdaptiveSFTTrainer(
        model,
        AdaptiveSFTConfig(output_dir=str(output), **(plain | quiet | settings)),
        dataset() if data is None else data,
        processing_class=tokenizer,
        peft_config=lora_config(4, 8) if lora is True else lora or None,
        reference_model=reference_model,
        critic=critic,
        callbacks=callbacks,
    )
    if random_b:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainer


def trainable(model) -> dict[str, torch.Tensor]:
    """Whole copies, also of weights that processes share."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: w.full_tensor() if isinstance(w, DTensor) else w.clone() for name, w in weights.items()}


def update(trainer) -> dict[str, torch.Tensor]:
    """Train; what it changed the weights by."""
    before = trainable(trainer.model)
    trainer.train()
    return {name: after - before[name] for name, after in trainable(trainer.model).items()}


CASES = {
    "llama3": {},
    "gemma3": {},
    "adapter-off": dict(reference="adapter-off"),
    "full fine-tuning": dict(reference="model", lora=False, learning_rate=0.01),
    "tied": dict(reference="model", lora=False, learning_rate=0.01),
    "mean over examples": dict(mean_over="example"),
    "risk of the step": dict(granularity="batch"),
    "highest risk of the step": dict(granularity="batch-max"),
    "anchors": dict(granularity="batch", data=dataset().add_column("anchor", [True, False, True] + [False] * 5)),
    # one process has nothing to hold to the reference: it must not leave the other waiting for it
    "one held": dict(reference="adapter-off", beta_min=0.0, data=dataset([0.0] * 7 + [1.0])),
}


def trainer_of(case: str, models: Path, output, **settings) -> AdaptiveSFTTrainer:
    """A trainer of a model in double precision."""
    folder = Path(models) / (case if case in ("gemma3", "tied") else "llama3")
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for _ in range(2))
    return make_trainer(model, AutoTokenizer.from_pretrained(folder), output, reference_model=reference, **(CASES[case] | settings))


def update_of(case: str, models: Path, output, **settings) -> dict[str, torch.Tensor]:
    """The update of one step over all eight examples."""
    trainer = trainer_of(case, models, output, **settings)
    change = update(trainer)
    assert trainer.state.global_step == 1
    return change


if __name__ == "__main__":
    models, output = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    gc.freeze()  # what the imports left is not looked at by each run's collection
    results = {case: update_of(case, models, output, per_device_train_batch_size=4) for case in CASES}
    results["accumulated"] = update_of("llama3", models, output, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert torch.distributed.get_world_size() == 2
    torch.save(results, output / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
