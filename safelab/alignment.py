"""The safe start: teach a model to refuse what is harmful, and to stay as it was everywhere else.

Harmful prompts get the opening of a refusal. Only openings are learned: with whole responses nearly all of the loss is
in the wording of refusals, and the one decision that matters is not learned. Benign prompts, twins of the harmful ones among
them, get the opening of the model's own answer, which makes that decision sharp, and, as examples of their own, longer texts
drawn from the unaligned model, on which the model is held to it by KL alone: taught its likeliest openings and nothing else,
it would come to find any other wording unlikely (a perplexity three times as high). Last, the adapter's strength, the factor
on all of its updates, is set like a threshold: the least that refuses enough of the harmful prompts of another split.
"""

from __future__ import annotations

import json
import logging
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from safelab.datasets import load_everyday_answers, load_prompts, load_refusals
from safelab.models import EMBEDDED, bf16_is_fast, load_model
from safelab.sources import atomic_dir, cached_json

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
    opening_hold: float = 0.3  # beta of benign openings (their alpha is 1 - beta)
    held_tokens: int = 32  # of each text on which the model is held to the unaligned one
    held_share: float = 0.5  # of the benign prompts, with such a text
    strengths: tuple[float, ...] = (1.0, 1.05, 1.1, 1.15, 1.2)
    wanted: float = 0.95  # share of the ``probe`` split's harmful prompts that must be refused
    seed: int = 0


def alignment_data(model, tokenizer, recipe: AlignmentRecipe):
    """The ``align`` splits with ``prompt``, ``response``, ``complete`` and ``risk`` (how much to stay as you are).

    About one in ten of the embedded model's answers to benign prompts is an apology; those prompts get openings with
    such words ruled out and no text of their own, so that the habit is not kept.
    """
    from datasets import Dataset

    rng = random.Random(recipe.seed)
    rows = [row for name in SETS for row in load_prompts(name, "align")]
    benign = [row["prompt"] for row in rows if not row["label"]]
    openings = dict(zip(benign, own_openings(model, tokenizer, benign)))
    held = [prompt for prompt in benign if not openings[prompt][1]]
    held = rng.sample(held, min(len(held), round(recipe.held_share * len(benign))))
    answers = dict(zip(held, own_answers(model, tokenizer, held, recipe.held_tokens, sample_seed=recipe.seed)))
    examples = []
    for row in rows:
        prompt, texts = row["prompt"], []
        if row["label"]:
            texts.append((rng.choice(load_refusals(row["category"])), recipe.opening_tokens, 0.0))
        else:
            texts.append((openings[prompt][0], recipe.opening_tokens, recipe.opening_hold))
        if prompt in answers:
            texts.append((answers[prompt], recipe.held_tokens, 1.0))
        for text, limit, risk in texts:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            example = {"prompt": prompt, "response": tokenizer.decode(ids[:limit]), "complete": len(ids) < limit, "risk": risk}
            if example["response"].strip():  # the model may say nothing
                examples.append(example)
    return Dataset.from_list(examples)


def own_answers(model, tokenizer, prompts: list[str], n_tokens: int, *, sample_seed: int) -> list[str]:
    """Texts drawn from the model's own distribution, cached."""
    from safelab.evaluation import generate

    key = [EMBEDDED, "sampled", n_tokens, sample_seed, prompts]
    return cached_json("answers", key, lambda: generate(model, tokenizer, prompts, max_new_tokens=n_tokens, sample_seed=sample_seed, progress="the model's own answers"))


def own_openings(model, tokenizer, prompts: list[str]) -> list[tuple[str, bool]]:
    """The greedy opening of the model's answer to each prompt, and whether it was an apology that had to be made anew. Cached."""
    from safelab.evaluation import generate, is_refusal

    def find() -> list:
        found = [(answer, False) for answer in generate(model, tokenizer, prompts, max_new_tokens=12, progress="how the model opens")]
        again = [i for i, (answer, _) in enumerate(found) if is_refusal(answer)]
        first = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in OPENINGS]
        if again:
            for i, answer in zip(again, generate(model, tokenizer, [prompts[i] for i in again], max_new_tokens=24, not_first=first)):
                found[i] = ("" if is_refusal(answer) else answer, True)
        return found

    return cached_json("answers", [EMBEDDED, "all openings", prompts, OPENINGS], find)


def calibrate(model, tokenizer, recipe: AlignmentRecipe) -> tuple[float, float]:
    """Set the strength of the model's adapter to the least of ``recipe.strengths`` that refuses ``recipe.wanted``, or to the last.

    Returns the strength and the share refused. Prompts of the ``probe`` split, which aligning does not learn from.
    """
    from peft.tuners.lora import LoraLayer

    from safelab.evaluation import generate, is_refusal

    prompts = list(load_prompts("harmful", "probe")["prompt"])
    for strength in recipe.strengths:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", strength)
        refused = sum(map(is_refusal, generate(model, tokenizer, prompts, max_new_tokens=12, progress=f"strength {strength}"))) / len(prompts)
        if refused >= recipe.wanted:
            break
    model.peft_config["default"].lora_alpha *= strength
    return strength, refused


def align(output: str | Path, recipe: AlignmentRecipe | None = None) -> Path:
    """Make the safe adapter for the embedded model -> ``output``, a PEFT adapter folder with ``recipe.json``.

    About 25 minutes on two cores. Raises FileExistsError if ``output`` is there already.
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
            bf16=bf16_is_fast(model.device.type),
            use_cpu=model.device.type == "cpu",
            disable_tqdm=True,
            logging_steps=5,
            save_strategy="no",
            seed=recipe.seed,
        )
        trainer = AdaptiveSFTTrainer(
            model, args, data, processing_class=tokenizer, callbacks=[ProgressBar("aligning")], peft_config=lora_config(recipe.rank, 2 * recipe.rank)
        )
        trainer.train()
        model = trainer.model
        about["strength"], about["refused"] = calibrate(model, tokenizer, recipe)
        model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
        model.save_pretrained(folder)
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
