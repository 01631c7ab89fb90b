"""Adaptive regularised fine-tuning: one config and one trainer on top of TRL's SFTTrainer.

Over the response tokens of a batch, each example i with its own risk s_i:

    L = sum_i sum_t [ alpha_i * NLL_it + beta_i * KL(pi_ref || pi_theta)_it ] / number of response tokens

with alpha and beta from :class:`safelab.schedules.RiskSchedule` (arXiv 2602.17546, section 3). With
``mean_over="example"`` each example's sum is divided by its own response tokens first, and the total by the number
of examples: an answer of one word then counts as much as one of a page.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from safelab.losses import token_kl, token_nll
from safelab.models import render_pairs
from safelab.reference import AdapterOffReference, CachedReference, ModelReference, response_logits, response_positions
from safelab.schedules import RiskSchedule

REFERENCES = ("cached", "adapter-off", "model")


@dataclass
class AdaptiveSFTConfig(SFTConfig):
    """TRL's SFTConfig plus the method's own settings.

    Parameters
    ----------
    beta_min, beta_max, granularity
        See :class:`safelab.schedules.RiskSchedule`.
    reference
        ``"cached"`` (default: hidden states computed once), ``"adapter-off"``, or ``"model"`` (a second model).
    mean_over
        ``"token"`` (default, as TRL does) or ``"example"`` (what micro-batches of one example amount to).
    """

    beta_min: float = field(default=0.1, metadata={"help": "Weight of the KL at risk 0."})
    beta_max: float = field(default=0.9, metadata={"help": "Weight of the KL at risk 1."})
    granularity: str = field(default="example", metadata={"help": "Risk per 'example' or averaged over the 'batch'."})
    reference: str = field(default="cached", metadata={"help": "'cached', 'adapter-off' or 'model'."})
    mean_over: str = field(default="token", metadata={"help": "The loss is a mean over each 'token' or each 'example'."})
    # TRL turns these two on even on a CPU; both are choices, so they start off
    bf16: bool | None = field(default=False, metadata={"help": "bfloat16 autocast."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})
    report_to: str | list[str] = field(default="none", metadata={"help": "Where metrics are reported."})

    def __post_init__(self) -> None:
        if self.packing or self.padding_free:
            raise ValueError("packing and padding_free merge examples into one row, where each would lose its own risk: turn them off")
        if self.reference not in REFERENCES:
            raise ValueError(f"reference {self.reference!r}: expected one of {', '.join(REFERENCES)}")
        if self.mean_over not in ("token", "example"):
            raise ValueError(f"mean_over {self.mean_over!r}: expected 'token' or 'example'")
        self.schedule  # noqa: B018 - bad bounds fail here, not at the first step
        super().__post_init__()

    @property
    def schedule(self) -> RiskSchedule:
        return RiskSchedule(self.beta_min, self.beta_max, self.granularity)


def tokenize_pairs(tokenizer, dataset: Dataset, *, max_length: int | None = 1024) -> Dataset:
    """Columns ``prompt``, ``response`` (optional ``risk``, ``anchor``, ``complete``) -> what :class:`PairCollator` takes.

    ``anchor`` marks an example that is only held to the reference (alpha 0, beta 1). ``complete`` is False for a
    response that was cut off: then no end of turn is learned. Labels are masked by position, not by token id: in many
    tokenizers padding and end of turn are one token, and the end of the turn must be learned.
    """
    _check_columns(dataset)
    complete = list(dataset["complete"]) if "complete" in dataset.column_names else None
    pairs = render_pairs(tokenizer, list(dataset["prompt"]), list(dataset["response"]), complete=complete, max_length=max_length)
    given = dataset["risk"] if "risk" in dataset.column_names else [0.0] * len(dataset)
    risks = [float("nan" if risk is None else risk) for risk in given]
    for index, risk in enumerate(risks):
        if not 0 <= risk <= 1:
            raise ValueError(f"risk {index} is {risk}, expected a number in [0, 1]")
    anchors = dataset["anchor"] if "anchor" in dataset.column_names else [False] * len(dataset)
    return Dataset.from_list(
        [
            {
                "input_ids": pair.input_ids,
                "labels": [-100] * pair.prompt_length + pair.input_ids[pair.prompt_length :],
                "risk": risk,
                "anchor": bool(anchor),
                "index": index,
            }
            for index, (pair, risk, anchor) in enumerate(zip(pairs, risks, anchors))
        ]
    )


def _check_columns(dataset: Dataset) -> None:
    missing = {"prompt", "response"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"the training data has no column {', '.join(sorted(missing))}; it has {', '.join(dataset.column_names)}")


@dataclass
class PairCollator:
    """Tokenised examples -> one right-padded batch of tensors."""

    pad_token_id: int

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(e["input_ids"]) for e in examples)
        shape = (len(examples), longest)
        ids, mask, labels = torch.full(shape, self.pad_token_id), torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for row, example in enumerate(examples):
            n = len(example["input_ids"])
            ids[row, :n] = torch.tensor(example["input_ids"])
            labels[row, :n] = torch.tensor(example["labels"])
            mask[row, :n] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "risk": torch.tensor([e["risk"] for e in examples], dtype=torch.float32),
            "anchor": torch.tensor([e["anchor"] for e in examples]),
            "index": torch.tensor([e["index"] for e in examples]),
        }


class AdaptiveSFTTrainer(SFTTrainer):
    """Fine-tune on prompt-response pairs, each held to the safe reference as strongly as its risk demands.

    Parameters
    ----------
    train_dataset
        Columns ``prompt`` and ``response``; ``risk`` in [0, 1] if ``critic`` is not given; optionally ``anchor`` and
        ``complete`` (:func:`tokenize_pairs`).
    critic
        Anything with ``score(prompts, responses) -> risks`` (:mod:`safelab.critics`). Each example is scored once.
    reference_model
        The frozen safe model, for ``reference="model"``.

    The reference is the model as it is given: with LoRA the same weights with the adapter off. So do not start
    from a model that already carries a trained adapter; merge it first.
    """

    _tag_names = ["safelab", "adaptive-sft"]

    def __init__(self, model, args: AdaptiveSFTConfig, train_dataset: Dataset, *, processing_class, critic=None, reference_model=None, **kwargs: Any):
        if critic is not None:
            _check_columns(train_dataset)
            risks = critic.score(list(train_dataset["prompt"]), list(train_dataset["response"]))
            if len(risks) != len(train_dataset):
                raise ValueError(f"the critic gave {len(risks)} risks for {len(train_dataset)} examples")
            if "risk" in train_dataset.column_names:
                train_dataset = train_dataset.remove_columns("risk")
            train_dataset = train_dataset.add_column("risk", np.asarray(risks, dtype=float).tolist())
        if args.schedule.beta_min != args.schedule.beta_max and "risk" not in train_dataset.column_names:
            raise ValueError("an adaptive schedule needs the risk of each example: give a critic or a 'risk' column")
        disable_dropout(model)
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.remove_unused_columns = False
        tokenized = tokenize_pairs(processing_class, train_dataset, max_length=args.max_length)
        super().__init__(
            model, args, PairCollator(processing_class.pad_token_id), tokenized, processing_class=processing_class, **kwargs
        )
        self.remove_callback(PrinterCallback)  # it prints every log to stdout, which belongs to results
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole accumulated batch
        self._signals: dict[str, list[float]] = defaultdict(list)
        needs_reference = args.schedule.needs_reference or any(tokenized["anchor"])
        self.reference = self._build_reference(reference_model) if needs_reference else None

    def _build_reference(self, reference_model: nn.Module | None):
        kind = self.args.reference
        config = getattr(self.model, "peft_config", {}).get("default")
        if kind == "model":
            if reference_model is None:
                raise ValueError("reference='model' needs a reference_model")
            return ModelReference(reference_model)
        if config is None:
            raise ValueError(f"reference={kind!r} needs LoRA (a peft_config); for full fine-tuning use reference='model'")
        if getattr(config, "bias", "none") != "none":
            raise ValueError(f"LoRA with bias={config.bias!r} trains biases that stay on when the adapter is off: use bias='none'")
        if kind == "adapter-off":
            return AdapterOffReference()
        if any(p.requires_grad for p in self.model.get_output_embeddings().parameters()):
            raise ValueError("reference='cached' needs a frozen output head: use reference='adapter-off'")
        return CachedReference.build(self.model, self._held_batches(), autocast=self.accelerator.autocast)

    def _held_batches(self, size: int = 32):
        """Batches, sorted by length, of the examples that are ever held to the reference."""
        rows = sorted(self.train_dataset, key=lambda row: len(row["input_ids"]))
        if self.args.granularity == "example":
            _, beta = self._weights(*(torch.tensor([row[k] for row in rows]) for k in ("risk", "anchor")))
            rows = [row for row, b in zip(rows, beta.tolist()) if b > 0]
        for start in tqdm(range(0, len(rows), size), desc="reference", unit="batch", leave=False):
            batch = self.data_collator(rows[start : start + size])
            yield {k: v.to(self.model.device) for k, v in batch.items()}

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "attention_mask", "labels", "risk", "anchor", "index"]

    def _get_num_items_in_batch(self, batch_samples, device):
        if self.args.mean_over == "example":  # the parent counts labels over micro-batches and processes: one for each example
            batch_samples = [{"labels": torch.tensor([[-100, 0]] * len(batch["labels"]))} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _weights(self, risk: torch.Tensor, anchor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and beta of each example: the schedule's, and 0 and 1 for anchors."""
        alpha, beta = torch.zeros_like(risk), torch.ones_like(risk)
        alpha[~anchor], beta[~anchor] = self.args.schedule(risk[~anchor])
        return alpha, beta

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective above, summed over this micro-batch and divided by the tokens (examples) of the whole batch."""
        risk, anchor, index, labels = (inputs[k] for k in ("risk", "anchor", "index", "labels"))
        forward = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        mask, targets = response_positions(labels)
        alpha, beta = self._weights(risk, anchor)
        row = mask.nonzero()[:, 0]  # which example each response token belongs to
        share = torch.ones_like(risk) if self.args.mean_over == "token" else 1 / mask.sum(1)

        logits = response_logits(model, forward, mask)
        nll = token_nll(logits, targets)
        loss = ((alpha * share)[row] * nll).sum()
        held = beta > 0  # an example that is not held needs no reference
        if bool(held.any()):
            reference = self.reference.logits(model, forward, mask & held[:, None], index[held])
            kl = token_kl(reference, logits[held[row]])
            loss = loss + ((beta * share)[row][held[row]] * kl).sum()
            self._signals["kl"].append(kl.mean().item())
        if not bool(anchor.all()):  # the user's own examples
            self._signals["nll"].append(nll[~anchor[row]].mean().item())
            self._signals["risk"].append(risk[~anchor].mean().item())
            self._signals["beta"].append(beta[~anchor].mean().item())

        here = targets.numel() if self.args.mean_over == "token" else len(risk)
        loss = loss / (here if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the mean over processes that DDP takes becomes a sum
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs.update({name: float(np.mean(values)) for name, values in self._signals.items()})
        self._signals.clear()
        super().log(logs, start_time)


def disable_dropout(model: nn.Module) -> None:
    """Dropout off everywhere, functional attention dropout too: with it the KL is not 0 at step 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "resid_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def lora_config(rank: int = 16, alpha: int = 32):
    """LoRA on all linear layers, without dropout or bias (so that adapter off *is* the reference)."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules="all-linear", task_type="CAUSAL_LM")


class StepClock(TrainerCallback):
    """Seconds of each optimiser step; the first two, which warm up, are left out of the median."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def median(self) -> float:
        """Median step time in seconds."""
        return float(np.median(self.seconds[2:] or self.seconds))


class ProgressBar(TrainerCallback):
    """One bar on stderr, with time left and the last signals (the trainer's own printing goes to stdout)."""

    def __init__(self, title: str) -> None:
        self.title, self.bar = title, None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.title, unit="step", leave=False)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.bar is not None:
            self.bar.set_postfix({k: f"{logs[k]:.2f}" for k in ("nll", "kl", "beta") if k in (logs or {})})

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update(1)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()
