"""The safe start: teach a model to refuse what is harmful, and to stay as it was everywhere else.

Harmful prompts get the opening of a refusal. Only openings are learned: with whole responses nearly all of the loss is
in the wording of refusals, and the one decision that matters is not learned. Benign prompts, twins of the harmful ones among
them, get texts drawn from the unaligned model itself and are held to it by KL alone: taught to repeat its likeliest answers
instead, it would refuse as well, and come to find any other wording unlikely (a perplexity three times as high).
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from safelab.datasets import load_everyday_answers, load_prompts, load_refusals
from safelab.models import EMBEDDED, load_model
from safelab.sources import atomic_dir, cache_dir, write_atomic

logger = logging.getLogger(__name__)

SETS = ("harmful", "advbench", "twins", "everyday")
OPENINGS = ("I", "As", "No", "Sorry", "We", "Unfortunately", "My")


@dataclass(frozen=True)
class AlignmentRecipe:
    """What makes ``data/safe-adapter``: LoRA on all linear layers, AdamW, cosine schedule."""

    epochs: int = 2
    learning_rate: float = 1e-3
    batch_size: int = 8
    rank: int = 8
    opening_tokens: int = 8  # of each response that is learned: whether to refuse is decided there
    held_tokens: int = 32  # of each text on which the model is held to the unaligned one
    seed: int = 0


def alignment_data(model, tokenizer, recipe: AlignmentRecipe):
    """The ``align`` splits as ``prompt``, ``response``, ``complete`` and ``risk`` (0: learn it; 1: stay as you are).

    About one in ten of the embedded model's answers to benign prompts is an apology; those are generated again with such
    openings ruled out and learned, so that the habit is not kept.
    """
    from datasets import Dataset

    rng = random.Random(recipe.seed)
    rows = [row for name in SETS for row in load_prompts(name, "align")]
    benign = [row["prompt"] for row in rows if not row["label"]]
    answers = iter(own_answers(model, tokenizer, benign, recipe.held_tokens, sample_seed=recipe.seed))
    openings = iter(own_openings(model, tokenizer, benign))
    examples = []
    for row in rows:
        response, held = rng.choice(load_refusals(row["category"])) if row["label"] else next(openings), False
        if not row["label"]:
            answer = next(answers)
            response, held = (response, False) if response else (answer, True)
        ids = tokenizer(response, add_special_tokens=False).input_ids
        limit = recipe.held_tokens if held else recipe.opening_tokens
        examples.append({"prompt": row["prompt"], "response": tokenizer.decode(ids[:limit]), "complete": len(ids) < limit, "risk": float(held)})
    return Dataset.from_list([e for e in examples if e["response"].strip()])  # the model may say nothing


def own_answers(model, tokenizer, prompts: list[str], n_tokens: int, *, sample_seed: int) -> list[str]:
    """Texts drawn from the model's own distribution, cached."""
    from safelab.evaluation import generate

    key = [EMBEDDED, "sampled", n_tokens, sample_seed, prompts]
    return _cached(key, lambda: generate(model, tokenizer, prompts, max_new_tokens=n_tokens, sample_seed=sample_seed, progress="the model's own answers"))


def own_openings(model, tokenizer, prompts: list[str]) -> list[str]:
    """For each prompt that the model would greedily refuse, what it says if it may not open so; else ``""``. Cached."""
    from safelab.evaluation import generate, is_refusal

    def find() -> list[str]:
        refused = [i for i, a in enumerate(generate(model, tokenizer, prompts, max_new_tokens=12, progress="what the model refuses")) if is_refusal(a)]
        first = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in OPENINGS]
        found = [""] * len(prompts)
        for i, answer in zip(refused, generate(model, tokenizer, [prompts[i] for i in refused], max_new_tokens=24, not_first=first)):
            found[i] = "" if is_refusal(answer) else answer
        return found

    return _cached([EMBEDDED, "openings", prompts, OPENINGS], find)


def _cached(key: list, make) -> list[str]:
    file = cache_dir() / "answers" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    made = make()
    write_atomic(file, json.dumps(made).encode())
    return made


def align(output: str | Path, recipe: AlignmentRecipe | None = None) -> Path:
    """Make the safe adapter for the embedded model -> ``output``, a PEFT adapter folder with ``recipe.json``.

    About 20 minutes on two cores. Raises FileExistsError if ``output`` is there already.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from safelab.experiments import fingerprint, versions
    from safelab.training import AdaptiveSFTConfig, AdaptiveSFTTrainer, ProgressBar, lora_config

    recipe = recipe or AlignmentRecipe()
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists: give another folder, or remove it first")
    model, tokenizer = load_model(EMBEDDED)
    data = alignment_data(model, tokenizer, recipe)
    about = {"model": EMBEDDED, "recipe": asdict(recipe), "examples": len(data), "data": fingerprint(data), "versions": versions()}
    with atomic_dir(output) as folder:
        args = AdaptiveSFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=recipe.batch_size,
            num_train_epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            beta_min=0.0,
            beta_max=1.0,
            bf16=True,
            use_cpu=model.device.type == "cpu",
            disable_tqdm=True,
            train_sampling_strategy="group_by_length",  # a quarter less padding
            logging_steps=5,
            save_strategy="no",
            seed=recipe.seed,
        )
        trainer = AdaptiveSFTTrainer(
            model, args, data, processing_class=tokenizer, peft_config=lora_config(recipe.rank, 2 * recipe.rank), callbacks=[ProgressBar("aligning")]
        )
        trainer.train()
        trainer.model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
        trainer.model.save_pretrained(folder)
        weights = load_file(folder / "adapter_model.safetensors")  # half the size, and far finer than the steps that made it
        save_file({k: v.to(torch.bfloat16) for k, v in weights.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "recipe.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template
    return output


def safety_report(model, tokenizer, reference=None) -> dict:
    """What the safe start must show, on prompts not used to make it: refusals by set, and benign perplexity.

    Perplexity is over written answers to held-out everyday prompts, which no model here has seen, and as a ratio to
    that of the unaligned ``reference`` model.
    """
    from safelab.evaluation import generate, is_refusal, perplexity, rate

    report = {}
    for name in ("advbench", "strongreject", "harmful", "everyday", "twins"):
        answers = generate(model, tokenizer, list(load_prompts(name, "eval")["prompt"]), progress=f"answering {name}")
        report[f"refusals_{name}"] = rate(is_refusal(a) for a in answers).to_dict()
    if reference is not None:
        rows = load_everyday_answers()
        unaligned, safe = (perplexity(m, tokenizer, list(rows["prompt"]), list(rows["response"])) for m in (reference, model))
        report["perplexity"] = {"unaligned": unaligned, "safe": safe, "n": len(rows), "ratio": safe / unaligned}
    return report
