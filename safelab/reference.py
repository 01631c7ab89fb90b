"""The safe reference policy: its logits at response positions, from the same weights or from a cache.

The reference of an example never changes, so what costs a forward pass a step can be computed once: the
*final hidden states* at response positions are exact and small (width, not vocabulary, numbers a token).
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from safelab.models import eval_mode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn


def response_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the next token is a response token.

    ``labels`` ``(batch, length)`` holds -100 at prompt and padding. Returns ``mask`` ``(batch, length)``, true at
    the position *before* each response token, and ``targets`` ``(n,)``, those tokens in row order.
    """
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    mask = shifted != -100
    return mask, shifted[mask]


def response_logits(model: nn.Module, inputs: dict, mask: torch.Tensor) -> torch.Tensor:
    """One forward pass, with the output head applied at ``mask`` only -> ``(n, vocabulary)``.

    The rows are dropped *before* the head, where most of the memory goes. Done by a hook, not by calling the
    decoder directly, so that DDP and FSDP see an ordinary forward pass of the wrapped model.
    """
    with _head_input(model, lambda hidden: hidden[mask]):
        return model(**inputs, use_cache=False).logits


@contextmanager
def _head_input(model: nn.Module, change):
    """What enters the output head goes through ``change`` first, inside this block only."""
    head = _unwrapped(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield head
    finally:
        handle.remove()


def _unwrapped(model: nn.Module) -> nn.Module:
    """The plain transformers model inside DDP, FSDP and PEFT wrappers."""
    while not hasattr(model, "get_output_embeddings"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class AdapterOffReference:
    """The same weights with the adapter off: no memory, one more forward pass a step."""

    def logits(self, model: nn.Module, inputs: dict, mask: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Reference logits ``(n, vocabulary)`` at ``mask``; no gradient."""
        peft_model = _peft_model(model)
        with torch.no_grad(), peft_model.disable_adapter():
            # not the DDP wrapper: its forward pass would wait for processes that have nothing to hold to the reference
            return response_logits(peft_model, inputs, mask)


class ModelReference:
    """A second, frozen model: for full fine-tuning, where no adapter can be turned off."""

    def __init__(self, reference: nn.Module) -> None:
        self.reference = reference.eval().requires_grad_(False)

    def logits(self, model: nn.Module, inputs: dict, mask: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Reference logits ``(n, vocabulary)`` at ``mask``; no gradient."""
        with torch.no_grad():
            return response_logits(self.reference, inputs, mask)


class CachedReference:
    """Final hidden states of the reference, by example; the (frozen) output head is applied at each step."""

    def __init__(self, states: dict[int, torch.Tensor]) -> None:
        self.states = states

    @classmethod
    def build(cls, model: nn.Module, batches: Iterable[dict], *, autocast=nullcontext) -> CachedReference:
        """One pass over collated ``batches`` (keys ``input_ids``, ``attention_mask``, ``labels``, ``index``)."""
        states: dict[int, torch.Tensor] = {}
        peft_model = _peft_model(model, required=False)
        off = peft_model.disable_adapter() if peft_model is not None else nullcontext()
        captured: list[torch.Tensor] = []

        def capture(hidden: torch.Tensor) -> torch.Tensor:
            captured.append(hidden)
            return hidden[:, :1]  # the head's own result is not needed

        with eval_mode(model), torch.no_grad(), off, autocast(), _head_input(model, capture) as head:
            for batch in batches:
                captured.clear()
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
                if not torch.allclose(head(captured[0]).to(logits.dtype), logits):
                    raise ValueError("this model caps or scales its logits, which the cache would miss: use reference='adapter-off'")
                mask, _ = response_positions(batch["labels"])
                for row, index in enumerate(batch["index"].tolist()):
                    states[index] = captured[0][row][mask[row]].clone()
        return cls(states)

    def logits(self, model: nn.Module, inputs: dict, mask: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Reference logits ``(n, vocabulary)`` at ``mask``; no gradient."""
        hidden = torch.cat([self.states[i] for i in indices.tolist()]).to(mask.device)
        with torch.no_grad():
            return _unwrapped(model).get_output_embeddings()(hidden)


def _peft_model(model: nn.Module, *, required: bool = True):
    while not hasattr(model, "disable_adapter") and hasattr(model, "module"):
        model = model.module
    if hasattr(model, "disable_adapter") and hasattr(model, "peft_config"):
        return model
    if required:
        raise ValueError("the adapter-off reference needs a PEFT model; for full fine-tuning give a reference_model")
    return None
