"""The safe reference policy: the same weights with the adapter off, a second model, or a cache.

The reference of an example never changes, so what costs a forward pass a step can be computed once. Where the output
head is frozen, all that the KL asks of it is a vector and a number for each response token (:class:`safelab.losses.Moments`):
small (width, not vocabulary), exact, and cheaper to use than the reference's hidden states or logits would be.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from safelab.losses import LOSS_MEMORY, Moments, moments
from safelab.models import eval_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


def response_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the next token is a response token.

    ``labels`` ``(batch, length)`` holds -100 at prompt and padding. Returns ``mask`` ``(batch, length)``, true at
    the position *before* each response token, and ``targets`` ``(n,)``, those tokens in row order.
    """
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    mask = shifted != -100
    return mask, shifted[mask]


def at_head(model: nn.Module, inputs: dict, function: Callable) -> torch.Tensor:
    """One forward pass in which ``function(head, hidden)`` takes the place of ``head(hidden)``; returns the model's logits.

    ``head`` is the output head's own forward method, ``hidden`` ``(batch, length, width)``. The function is called
    *inside* an ordinary forward pass of the wrapped model, where DDP looks on and FSDP has gathered the weights.
    """
    head = output_head(model)
    own, replaced = head.forward, vars(head).get("forward")
    head.forward = lambda hidden: function(own, hidden)
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        if replaced is None:
            del head.forward
        else:
            head.forward = replaced


def response_logits(model: nn.Module, inputs: dict, mask: torch.Tensor) -> torch.Tensor:
    """One forward pass, with the output head applied at ``mask`` only -> ``(n, vocabulary)``.

    The rows are dropped *before* the head, where most of the memory goes.
    """
    return at_head(model, inputs, lambda head, hidden: head(hidden[mask]))


def response_states(model: nn.Module, inputs: dict, mask: torch.Tensor) -> torch.Tensor:
    """One forward pass without the output head: what would enter it at ``mask``, ``(n, width)``."""
    return at_head(model, inputs, lambda _, hidden: hidden[mask])


def output_head(model: nn.Module) -> nn.Module:
    """The output head inside DDP, FSDP and PEFT wrappers."""
    while not hasattr(model, "get_output_embeddings"):
        model = model.module
    return model.get_output_embeddings()


@torch.no_grad()
def has_plain_head(model: nn.Module) -> bool:
    """Whether the model's logits are one linear map of its last hidden state: not capped, not scaled, no adapter in it."""
    if type(output_head(model)) is not nn.Linear:
        return False
    own: list[torch.Tensor] = []

    def keep(head, hidden):
        own.append(head(hidden))
        return own[0]

    with eval_mode(model):
        logits = at_head(model, {"input_ids": torch.arange(2, device=next(model.parameters()).device)[None]}, keep)
    return torch.equal(own[0].to(logits.dtype), logits)


class AdapterOff:
    """The same weights with the adapter off: no memory, one more forward pass a step."""

    @contextmanager
    def model(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The reference as a model, inside this block only; no gradient."""
        peft_model = _peft_model(policy)
        if peft_model is None:
            raise ValueError("the adapter-off reference needs a PEFT model; for full fine-tuning give a reference_model")
        # not the DDP wrapper: its forward pass would wait for processes that have nothing to hold to the reference
        with torch.no_grad(), peft_model.disable_adapter():
            yield peft_model


class SecondModel:
    """A second, frozen model: for full fine-tuning, where no adapter can be turned off."""

    def __init__(self, reference: nn.Module) -> None:
        self.reference = reference.eval().requires_grad_(False)

    @contextmanager
    def model(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The reference as a model, inside this block only; no gradient."""
        with torch.no_grad():
            yield self.reference


@dataclass
class CachedMoments:
    """Moments of each response token of each example, made in one pass of the model as it is before training.

    Parameters
    ----------
    values
        ``(tokens, width + 1)`` float32: the mean row of the head, then the offset. It may be memory-mapped.
    spans
        Index of an example -> where its tokens are.
    """

    values: np.ndarray
    spans: dict[int, slice]

    def moments(self, indices: list[int], like: torch.Tensor) -> Moments:
        """Of the response tokens of these examples, one after the other; zeros for an example that is not here.

        ``like`` ``(batch, length)`` is the mask of response positions: it has the counts and the device.
        """
        counts = like.sum(1).tolist()
        empty = np.zeros((max(counts), self.values.shape[1]), np.float32)
        rows = [self.values[self.spans[i]] if i in self.spans else empty[:n] for i, n in zip(indices, counts, strict=True)]
        found = torch.from_numpy(np.concatenate(rows)).to(like.device)
        return Moments(found[:, :-1], found[:, -1])


FILL_TOKENS = {"cpu": 2_400, "gpu": 16_000}
"""Tokens of a batch in that one pass: more is no faster on a CPU, and pads more."""


def response_spans(rows: Iterable[dict]) -> tuple[dict[int, slice], int]:
    """Where the response tokens of tokenised examples lie, one example after the other, by ``index``; and how many there are."""
    spans, end = {}, 0
    for row in rows:
        start, end = end, end + sum(label != -100 for label in row["labels"])
        spans[row["index"]] = slice(start, end)
    return spans, end


def in_batches(rows: Iterable[dict], device: str) -> Iterator[list[dict]]:
    """Tokenised examples by length, in batches of at most :data:`FILL_TOKENS` with their padding."""
    batch: list[dict] = []
    most = FILL_TOKENS["cpu" if device == "cpu" else "gpu"]
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if batch and (len(batch) + 1) * len(row["input_ids"]) > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def fill_moments(model: nn.Module, batches: Iterable[dict], spans: dict[int, slice], values: np.ndarray, *, autocast=nullcontext, memory: float = LOSS_MEMORY) -> None:
    """One pass over collated ``batches`` (``input_ids``, ``attention_mask``, ``labels``, ``index``), its adapter off -> ``values``."""
    peft_model = _peft_model(model)
    head = output_head(model)
    with eval_mode(model), torch.no_grad(), peft_model.disable_adapter() if peft_model else nullcontext(), autocast():
        for batch in batches:
            mask, _ = response_positions(batch["labels"])
            hidden = response_states(model, {k: batch[k] for k in ("input_ids", "attention_mask")}, mask)
            mean, offset = moments(hidden, head.weight, head.bias, memory=memory)
            rows = torch.cat([mean, offset[:, None]], 1).float().cpu().numpy()
            ends = mask.sum(1).cumsum(0).tolist()
            for index, start, end in zip(batch["index"].tolist(), [0, *ends], ends):
                values[spans[index]] = rows[start:end]


def _peft_model(model: nn.Module):
    while not hasattr(model, "disable_adapter") and hasattr(model, "module"):
        model = model.module
    return model if hasattr(model, "disable_adapter") and hasattr(model, "peft_config") else None
