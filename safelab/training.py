"""Adaptive regularised fine-tuning: one config and one trainer on top of TRL's SFTTrainer.

Over the response tokens of a batch, each example i with its own risk s_i:

    L = sum_i sum_t [ alpha_i * NLL_it + beta_i * KL(pi_ref || pi_theta)_it ] / number of response tokens

with alpha and beta from :class:`safelab.schedules.RiskSchedule` (arXiv 2602.17546, section 3). With
``mean_over="example"`` each example's sum is divided by its own response tokens first, and the total by the number
of examples: an answer of one word then counts as much as one of a page.

A batch is all that one optimiser step sees: however it is cut into micro-batches and dealt to processes, loss and
update are the same. Nor do they depend on the kind of reference, nor on how much memory the logits may take.

For several devices there are configurations of ``accelerate launch`` in ``safelab/accelerate``. Tested with two processes
on a CPU: DDP, and FSDP2 as that configuration wraps a model (update, checkpoint, saving). accelerate itself offers FSDP on
GPUs only, so the test corrects its choice of plain DDP; on GPUs neither has been run.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from safelab.activations import mapped_array, model_fingerprint
from safelab.attention import quick_attention
from safelab.losses import LOSS_MEMORY, Head, head_loss, token_kl, token_nll
from safelab.models import end_of_turn_ids, frozen_in_half, render_pairs
from safelab.reference import (
    FILL_TOKENS,
    AdapterOff,
    CachedMoments,
    SecondModel,
    at_head,
    fill_moments,
    has_plain_head,
    in_batches,
    output_head,
    response_logits,
    response_positions,
    response_spans,
    response_states,
)
from safelab.schedules import RiskSchedule
from safelab.sources import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable

REFERENCES = ("auto", "cached", "adapter-off", "model")


@dataclass
class AdaptiveSFTConfig(SFTConfig):
    """TRL's SFTConfig plus the method's own settings.

    Parameters
    ----------
    beta_min, beta_max, schedule_kind, risk_threshold, granularity, risk_smoothing
        See :class:`safelab.schedules.RiskSchedule`.
    reference
        ``"cached"`` (:class:`safelab.losses.Moments` of each response token, computed once and kept on disk),
        ``"adapter-off"``, ``"model"`` (a second model), or ``"auto"``: cached where the output head is frozen and plain
        and the file fits ``cache_budget``, else adapter-off with LoRA, else the second model.
    cache_budget
        Gigabytes: the largest file that ``"auto"`` writes.
    loss_memory
        Megabytes that logits may take at a time.
    mean_over
        ``"token"`` (default, as TRL does) or ``"example"`` (what micro-batches of one example amount to).
    anchor_share
        Anchors that an epoch shows for each other example, the next ones of them in each; None shows all of them.
    kl_direction
        ``"forward"``, the method's KL(reference || model), or ``"reverse"``, for comparison: it needs logits of both, so
        the reference cannot be cached.
    signals_file
        A file for one JSON line per example and step, written as training goes on:
        ``step, index, anchor, tokens, risk, alpha, beta, nll, kl`` (means over the example's response tokens).
    """

    beta_min: float = field(default=0.1, metadata={"help": "Weight of the KL at risk 0."})
    beta_max: float = field(default=0.9, metadata={"help": "Weight of the KL at risk 1."})
    schedule_kind: str = field(default="linear", metadata={"help": "How beta grows with the risk: 'linear', 'clamp' or 'threshold'."})
    risk_threshold: float = field(default=0.5, metadata={"help": "The risk from which a 'threshold' schedule holds."})
    granularity: str = field(default="example", metadata={"help": "A risk per 'example' or 'token', or one of the step: 'batch', 'batch-max'."})
    risk_smoothing: float = field(default=0.0, metadata={"help": "lambda of the smoothing of a step's risk over steps."})
    reference: str = field(default="auto", metadata={"help": "'auto', 'cached', 'adapter-off' or 'model'."})
    cache_budget: float = field(default=4.0, metadata={"help": "GB that a cached reference may take for 'auto' to choose it."})
    loss_memory: float = field(default=LOSS_MEMORY, metadata={"help": "MB that logits may take at a time."})
    mean_over: str = field(default="token", metadata={"help": "The loss is a mean over each 'token' or each 'example'."})
    anchor_share: float | None = field(default=None, metadata={"help": "Anchors that an epoch shows for each other example."})
    kl_direction: str = field(default="forward", metadata={"help": "'forward' (the method's) or 'reverse'."})
    signals_file: str | None = field(default=None, metadata={"help": "JSON lines with the signals of each example and step."})
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
        if self.kl_direction not in ("forward", "reverse"):
            raise ValueError(f"kl_direction {self.kl_direction!r}: expected 'forward' or 'reverse'")
        if self.save_total_limit == 1:
            raise ValueError("save_total_limit=1: the checkpoint before must be kept until the next one is complete, so give 2 or more")
        self.schedule  # noqa: B018 - bad bounds fail here, not at the first step
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU: on a CPU it would quietly be single precision, so choose bf16 or neither")

    @property
    def schedule(self) -> RiskSchedule:
        return RiskSchedule(self.beta_min, self.beta_max, self.schedule_kind, self.risk_threshold, self.granularity, self.risk_smoothing)


def tokenize_pairs(tokenizer, dataset: Dataset, *, max_length: int | None = 1024) -> Dataset:
    """Columns ``prompt``, ``response`` (optional ``risk``, ``anchor``, ``complete``) -> what :class:`PairCollator` takes.

    ``risk`` is a number in [0, 1], or a list with one for each token of the response; the end of the turn takes the last.
    ``anchor`` marks an example that is only held to the reference (alpha 0, beta 1). ``complete`` is False for a
    response that was cut off: then no end of turn is learned. Labels are masked by position, not by token id: in many
    tokenizers padding and end of turn are one token, and the end of the turn must be learned.

    Raises
    ------
    ValueError
        A missing column, a risk outside [0, 1], or risks that do not match the response's tokens.
    """
    _check_columns(dataset)
    complete = list(dataset["complete"]) if "complete" in dataset.column_names else None
    pairs = render_pairs(tokenizer, list(dataset["prompt"]), list(dataset["response"]), complete=complete, max_length=max_length)
    risks = dataset["risk"] if "risk" in dataset.column_names else [0.0] * len(dataset)
    anchors = dataset["anchor"] if "anchor" in dataset.column_names else [False] * len(dataset)
    end = len(end_of_turn_ids(tokenizer))
    rows = []
    for index, (pair, risk, anchor) in enumerate(zip(pairs, risks, anchors)):
        tokens = len(pair.input_ids) - pair.prompt_length
        if isinstance(risk, list):
            cut = len(pair.input_ids) == max_length
            own = tokens - (end if complete is None or complete[index] else 0)
            if not risk or len(risk) != own and not (cut and len(risk) > own):
                raise ValueError(f"example {index} has {len(risk)} risks for {own} response tokens")
            risk = (risk + [risk[-1]] * end)[:tokens]
        for value in risk if isinstance(risk, list) else [risk]:
            if value is None or not 0 <= value <= 1:
                raise ValueError(f"risk {index} is {value}, expected a number in [0, 1]")
        labels = [-100] * pair.prompt_length + pair.input_ids[pair.prompt_length :]
        rows.append({"input_ids": pair.input_ids, "labels": labels, "risk": risk, "anchor": bool(anchor), "index": index})
    return Dataset.from_list(rows)


def _check_columns(dataset: Dataset) -> None:
    missing = {"prompt", "response"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"the training data has no column {', '.join(sorted(missing))}; it has {', '.join(dataset.column_names)}")


@dataclass
class PairCollator:
    """Tokenised examples -> one right-padded batch of tensors; risks of tokens stand before their tokens, as predictions do."""

    pad_token_id: int

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(e["input_ids"]) for e in examples)
        shape = (len(examples), longest)
        ids, mask, labels = torch.full(shape, self.pad_token_id), torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        by_token = isinstance(examples[0]["risk"], list)
        risk = torch.zeros(shape if by_token else len(examples))
        for row, example in enumerate(examples):
            n = len(example["input_ids"])
            ids[row, :n] = torch.tensor(example["input_ids"])
            labels[row, :n] = torch.tensor(example["labels"])
            mask[row, :n] = 1
            if by_token:
                risk[row, n - 1 - len(example["risk"]) : n - 1] = torch.tensor(example["risk"])
            else:
                risk[row] = example["risk"]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "risk": risk,
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
        Anything with ``score(prompts, responses) -> risks`` (:mod:`safelab.critics`), for granularity ``"token"`` a
        list of risks for each response. Each example is scored once.
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
            train_dataset = train_dataset.add_column("risk", [np.asarray(risk, dtype=float).tolist() for risk in risks])
        if args.schedule.beta_min != args.schedule.beta_max and "risk" not in train_dataset.column_names:
            raise ValueError("an adaptive schedule needs the risk of each example: give a critic or a 'risk' column")
        disable_dropout(model)
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.remove_unused_columns = False
        tokenized = tokenize_pairs(processing_class, train_dataset, max_length=args.max_length)
        if "risk" in train_dataset.column_names and isinstance(tokenized[0]["risk"], list) != (args.granularity == "token"):
            raise ValueError(f"granularity {args.granularity!r} needs {'a list of risks, one a token,' if args.granularity == 'token' else 'one risk'} for each example")
        super().__init__(
            model, args, PairCollator(processing_class.pad_token_id), tokenized, processing_class=processing_class, **kwargs
        )
        self.remove_callback(PrinterCallback)  # it prints every log to stdout, which belongs to results
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole accumulated batch
        self._smoothed: float | None = None
        self._sums = np.zeros((len(SIGNALS), 2))
        self._file = SignalsFile(args.signals_file) if args.signals_file else None
        if self._file:
            self.add_callback(self._file)
        self._plain_head = has_plain_head(self.model)
        needs_reference = args.schedule.needs_reference or any(tokenized["anchor"])
        self.reference = self._build_reference(reference_model) if needs_reference else None

    # ------------------------------------------------------------------------------- the reference

    def _build_reference(self, reference_model: nn.Module | None):
        kind, obstacle = self.args.reference, None
        lora = getattr(self.model, "peft_config", {}).get("default")
        if any(p.requires_grad for p in output_head(self.model).parameters()):
            obstacle = "needs a frozen output head"
        elif not self._plain_head:
            obstacle = "needs logits that are one linear map of the last hidden state, and this model caps or scales them"
        elif self.args.kl_direction == "reverse":
            obstacle = "holds what the forward KL needs, not the reverse one"
        if kind == "auto":
            fits = self._cache_size() <= 1e9 * self.args.cache_budget
            kind = "cached" if obstacle is None and fits else "adapter-off" if lora is not None and reference_model is None else "model"
        if kind == "model":
            if reference_model is None:
                raise ValueError("the reference of full fine-tuning is a second model: give reference_model, a frozen copy of the safe one")
            return SecondModel(reference_model)
        if lora is None and (kind == "adapter-off" or obstacle):
            raise ValueError(f"reference={kind!r} needs LoRA (a peft_config); for full fine-tuning use reference='model'")
        if getattr(lora, "bias", "none") != "none":
            raise ValueError(f"LoRA with bias={lora.bias!r} trains biases that stay on when the adapter is off: use bias='none'")
        if kind == "adapter-off":
            return AdapterOff()
        if obstacle:
            raise ValueError(f"reference='cached' {obstacle}: use reference='adapter-off'")
        return self._cached_reference()

    def _held_rows(self) -> list[dict]:
        """The examples that are ever held to the reference."""
        rows = list(self.train_dataset)
        if self.args.schedule.of_step or self.args.granularity == "token":
            return rows
        _, beta = self._weights(*(torch.tensor([row[k] for row in rows]) for k in ("risk", "anchor")))
        return [row for row, b in zip(rows, beta.tolist()) if b > 0]

    def _cache_size(self) -> int:
        """Bytes of a cached reference."""
        return 4 * response_spans(self._held_rows())[1] * (output_head(self.model).weight.shape[1] + 1)

    def _cached_reference(self) -> CachedMoments:
        """Made in one pass (:func:`safelab.reference.in_batches`); found again by whoever trains this model on these examples."""
        rows = self._held_rows()
        spans, tokens = response_spans(rows)

        def fill(values: np.ndarray) -> None:
            batches = tqdm(list(in_batches(rows, self.model.device.type)), desc="reference", unit="batch", leave=False)
            on_device = ({k: v.to(self.model.device) for k, v in self.data_collator(batch).items()} for batch in batches)
            with self.frozen_in_half():
                fill_moments(self.model, on_device, spans, values, autocast=self.accelerator.autocast, memory=self.args.loss_memory)

        with self.accelerator.main_process_first():  # the others find its file
            with self.model.disable_adapter() if hasattr(self.model, "peft_config") else nullcontext():
                weights = model_fingerprint(self.model)
            examples = hashlib.sha256(json.dumps([[row["input_ids"], row["labels"]] for row in rows]).encode()).hexdigest()
            about = {"model": weights, "examples": examples, "precision": self.accelerator.mixed_precision, "content": "moments", "batches": FILL_TOKENS}
            values = mapped_array("references", about, (tokens, output_head(self.model).weight.shape[1] + 1), fill)
        return CachedMoments(values, spans)

    # ------------------------------------------------------------------------------- the objective

    def _get_train_sampler(self, train_dataset=None):
        anchor, share = np.array(self.train_dataset["anchor"]), self.args.anchor_share
        if share is None or anchor.sum() <= round(share * (~anchor).sum()):
            return super()._get_train_sampler(train_dataset)
        return AnchorRounds(anchor, share, self.args.data_seed or self.args.seed)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "attention_mask", "labels", "risk", "anchor", "index"]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step; with a granularity of the step, their risk becomes that of all of them, on all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        schedule = self.args.schedule
        if schedule.of_step and batches:
            free = torch.cat([batch["risk"][~batch["anchor"]] for batch in batches])
            if self.accelerator.num_processes > 1:
                free = torch.tensor(gather_object(free.tolist()))
            if len(free):
                self._smoothed = schedule.smooth(schedule.pool(free).item(), self._smoothed)
                for batch in batches:
                    batch["risk"] = torch.full_like(batch["risk"], self._smoothed)
        return batches, items

    def _get_num_items_in_batch(self, batch_samples, device):
        if self.args.mean_over == "example":  # the parent counts labels over micro-batches and processes: one for each example
            batch_samples = [{"labels": torch.tensor([[-100, 0]] * len(batch["labels"]))} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _weights(self, risk: torch.Tensor, anchor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and beta: the schedule's, and 0 and 1 for anchors."""
        alpha, beta = self.args.schedule(risk)
        return torch.where(anchor, 0, alpha), torch.where(anchor, 1, beta)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective above, summed over this micro-batch and divided by the tokens (examples) of the whole batch."""
        risk, anchor, index, labels = (inputs[k] for k in ("risk", "anchor", "index", "labels"))
        forward = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        mask, targets = response_positions(labels)
        row = mask.nonzero()[:, 0]  # which example each response token belongs to
        risk = risk[mask] if risk.dim() == 2 else risk[row]
        alpha, beta = self._weights(risk, anchor[row])
        share = 1 if self.args.mean_over == "token" else (1 / mask.sum(1))[row]

        if self._plain_head and self.args.kl_direction == "forward":
            loss, nll, kl = self._fused_loss(model, forward, mask, targets, alpha * share, beta * share, index)
        else:
            logits = response_logits(model, forward, mask)
            nll, kl = token_nll(logits, targets), torch.zeros_like(alpha)
            if self.reference is not None and self._any_held(beta):
                with self.reference.model(model) as reference, self.accelerator.autocast():
                    theirs = response_logits(reference, forward, mask)
                kl = token_kl(theirs, logits) if self.args.kl_direction == "forward" else token_kl(logits, theirs)
            loss = (share * (alpha * nll + beta * kl)).sum()
        self._note(row, index, anchor, risk, alpha, beta, nll.detach(), kl.detach())

        here = targets.numel() if self.args.mean_over == "token" else len(index)
        loss = loss / (here if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the mean over processes that DDP takes becomes a sum
        return (loss, None) if return_outputs else loss

    def _any_held(self, beta: torch.Tensor) -> bool:
        """Whether this micro-batch needs the reference; under FSDP it always does, as all processes gather weights in one order."""
        return self.is_fsdp_enabled or bool((beta > 0).any())

    def _fused_loss(self, model, forward: dict, mask, targets, alpha, beta, index) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """:func:`safelab.losses.head_loss` in the place of the output head."""
        reference = None
        if isinstance(self.reference, CachedMoments):
            reference = self.reference.moments(index.tolist(), mask)
        elif self.reference is not None and self._any_held(beta):
            # the policy's own forward pass is under autocast, but only once the trainer has wrapped it
            with self.reference.model(model) as other, self.accelerator.autocast():
                own = output_head(other)
                reference = Head(response_states(other, forward, mask), own.weight, own.bias)
        terms: list[torch.Tensor] = []

        def in_place_of_the_head(_, hidden: torch.Tensor) -> torch.Tensor:
            head = output_head(model)
            loss, *rest = head_loss(hidden[mask], head.weight, head.bias, targets, alpha, beta, reference, memory=self.args.loss_memory)
            terms.extend(rest)
            return loss

        return at_head(model, forward, in_place_of_the_head), *terms

    # ------------------------------------------------------------------------------- what is seen of it

    @torch.no_grad()
    def _note(self, row, index, anchor, risk, alpha, beta, nll, kl) -> None:
        """Signals of this micro-batch: sums for the log, and a line an example for the file. All but the first three: of tokens."""
        tokens = torch.bincount(row, minlength=len(index))
        values = torch.stack([x.double() for x in (nll, kl, risk, alpha, beta)], 1).cpu()
        row, anchor, tokens = row.cpu(), anchor.cpu(), tokens.cpu()
        means = torch.zeros(len(index), len(SIGNALS), dtype=torch.double).index_add_(0, row, values) / tokens[:, None]
        free, held = ~anchor[row], values[:, 4] > 0
        for column, counted in ((0, values[free, 0]), (1, values[held, 1]), *((c, means[~anchor, c]) for c in (2, 3, 4))):
            self._sums[column] += counted.sum().item(), len(counted)
        if self._file:
            for i, is_anchor, n, example in zip(index.tolist(), anchor.tolist(), tokens.tolist(), means.tolist()):
                line = {"step": self.state.global_step + 1, "index": i, "anchor": is_anchor, "tokens": n}
                self._file.lines.append(line | {name: round(x, 6) for name, x in zip(SIGNALS, example)})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log, over all processes: of the user's own tokens (nll), of those held (kl), of examples."""
        if not {"loss", "train_loss"} & logs.keys():
            return super().log(logs, start_time)  # a monitor's figures: the step's own log comes after them
        sums = self._sums
        if self.accelerator.num_processes > 1:
            sums = np.sum(gather_object([sums]), axis=0)
        logs.update({name: total / n for name, (total, n) in zip(SIGNALS, sums.tolist()) if n})
        self._sums = np.zeros_like(sums)
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads

    def _save_checkpoint(self, model, trial) -> None:
        """The parent's, with a marker that is written last: a checkpoint that was cut short has none."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / MARKER).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sizes = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
            write_atomic(folder / MARKER, json.dumps({"smoothed_risk": self._smoothed, "sizes": sizes}).encode())

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any):
        """The parent's. ``True`` goes on from the last complete checkpoint in ``output_dir``, or begins where there is none."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = latest_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resume_from_checkpoint)
            if not is_complete(Path(resume_from_checkpoint)):
                raise ValueError(f"{resume_from_checkpoint} is not a complete checkpoint: it was cut short or changed")
            self._smoothed = json.loads((Path(resume_from_checkpoint) / MARKER).read_text(encoding="utf-8"))["smoothed_risk"]
        with self.quick_steps():
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    @contextmanager
    def quick_steps(self):
        """Inside, steps cost less and learn the same."""
        with self.frozen_in_half(), quick_attention(self.model):
            yield

    def frozen_in_half(self):
        """:func:`safelab.models.frozen_in_half` for the model and its reference, under bfloat16 autocast; not where weights are sharded."""
        if not self.args.bf16 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return nullcontext()
        reference = getattr(self, "reference", None)
        return frozen_in_half(self.model, *([reference.reference] if isinstance(reference, SecondModel) else []))


class AnchorRounds(Sampler):
    """Every epoch all examples that are no anchors and the next few anchors, shuffled: many anchors at the cost of few.

    Parameters
    ----------
    anchor
        Which examples are anchors, ``(n,)``.
    share
        Anchors in an epoch for each other example.
    """

    def __init__(self, anchor: np.ndarray, share: float, seed: int) -> None:
        self.free, self.anchors = np.flatnonzero(~anchor), np.random.default_rng(seed).permutation(np.flatnonzero(anchor))
        self.each, self.seed, self.epoch = round(share * len(self.free)), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next; the trainer says it."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return len(self.free) + self.each

    def __iter__(self):
        shown = self.anchors.take(range(self.epoch * self.each, (self.epoch + 1) * self.each), mode="wrap")
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(np.concatenate([self.free, shown])).tolist())


SIGNALS = ("nll", "kl", "risk", "alpha", "beta")
MARKER = "complete.json"


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, and each of its files still has its size."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["sizes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in ``folder``; None where there is none."""
    found = [path for path in Path(folder).glob("checkpoint-*") if is_complete(path)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


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

    def median(self) -> float | None:
        """Median step time in seconds; None before the first step."""
        return float(np.median(self.seconds[2:] or self.seconds)) if self.seconds else None


class SignalsFile(TrainerCallback):
    """Lines noted during a step go to a JSON-lines file at its end; a resumed run drops what came after its checkpoint."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.lines = Path(path), []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            kept = [line for line in _json_lines(self.path) if line["step"] <= state.global_step]
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        lines = gather_object(self.lines) if args.world_size > 1 else self.lines
        self.lines = []
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def _json_lines(path: Path) -> list[dict]:
    """Objects in a file that may be missing, or end in half a line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class SafetyMonitor(TrainerCallback):
    """Measures the model every so many steps, logs it, and stops training where a rate leaves its budget.

    Parameters
    ----------
    trainer
        Its log (and so every ``report_to``) gets the figures.
    measure
        ``measure(model) -> {"asr": 0.03, ...}``: rates on a small set, say. All processes call it.
    every
        Steps between measurements.
    stop_above
        The most that each named rate may be; the first that is above stops the training.

    Examples
    --------
    >>> trainer.add_callback(SafetyMonitor(trainer, measure, every=20, stop_above={"asr": 0.05}))
    """

    def __init__(self, trainer: AdaptiveSFTTrainer, measure: Callable[[nn.Module], dict[str, float]], *, every: int, stop_above: dict[str, float] | None = None) -> None:
        self.trainer, self.measure, self.every, self.stop_above = trainer, measure, every, stop_above or {}
        self.stopped: str | None = None

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % self.every:
            return
        figures, due = self.measure(model), control.should_log
        self.trainer.log(dict(figures))
        control.should_log = due  # that log would count as the step's own
        over = [f"{name} {figures[name]:.3f} > {most}" for name, most in self.stop_above.items() if figures[name] > most]
        if over:
            self.stopped = f"stopped after step {state.global_step}: {', '.join(over)}"
            control.should_training_stop = True


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
