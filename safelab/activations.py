"""Prompts -> Activations (examples x layers x width): what a model computes before it writes a word.

Layer 0 is the embedding output, layer l the output of transformer block l (before the final norm). Batches
are sorted by length, the forward pass stops after the deepest layer asked for, and only the positions asked
for are kept, so memory grows with the result and not with layers x tokens x prompts.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from safelab.models import decoder_layers, pad_left, render_pairs, render_prompts

POSITIONS = ("last", "mean")


@dataclass(frozen=True)
class Activations:
    """``values`` ``(examples, layers, width)`` float32 and the layer numbers of its second axis."""

    values: np.ndarray
    layers: tuple[int, ...]
    position: str

    def layer(self, number: int) -> np.ndarray:
        """``(examples, width)`` of one layer; ValueError if it was not extracted."""
        if number not in self.layers:
            raise ValueError(f"layer {number} was not extracted; there are {', '.join(map(str, self.layers))}")
        return self.values[:, self.layers.index(number)]


class _Deep(Exception):
    """Raised in a hook once the deepest layer asked for is read."""


def extract_activations(
    model,
    tokenizer,
    prompts: list[str],
    responses: list[str] | None = None,
    *,
    layers: list[int] | None = None,
    position: str = "last",
    batch_size: int = 32,
    half: bool | None = None,
    progress: str | None = None,
) -> Activations:
    """Hidden states of prompts (or prompt + response) at one position.

    Parameters
    ----------
    responses
        Given: the text is prompt + response + end of turn. Otherwise: the prompt through the template's generation
        prompt, so that ``"last"`` is the state from which the first response token would be written.
    layers
        0 (embeddings) to the number of blocks; default all.
    position
        ``"last"`` token, or the ``"mean"`` over the tokens of the text (over the response, where one is given).
    half
        bfloat16 autocast; default on a CPU. The result is float32 either way.

    Raises
    ------
    ValueError
        No prompts, an unknown layer or position, or activations that are not finite.
    """
    blocks = decoder_layers(model)
    layers = list(range(len(blocks) + 1)) if layers is None else sorted(set(layers))
    if not prompts:
        raise ValueError("no prompts to extract activations from")
    if position not in POSITIONS:
        raise ValueError(f"position {position!r}: expected one of {', '.join(POSITIONS)}")
    if not layers or layers[0] < 0 or layers[-1] > len(blocks):
        raise ValueError(f"layers {layers}: this model has 0 (embeddings) to {len(blocks)}")
    if responses is None:
        rendered = render_prompts(tokenizer, prompts)
        starts = [0] * len(prompts)
    else:
        pairs = render_pairs(tokenizer, prompts, responses)
        rendered, starts = [p.input_ids for p in pairs], [p.prompt_length for p in pairs]

    values: np.ndarray | None = None
    order = sorted(range(len(prompts)), key=lambda i: len(rendered[i]))
    half = model.device.type == "cpu" if half is None else half
    cast = torch.autocast(model.device.type, torch.bfloat16) if half else nullcontext()
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, unit="prompt", leave=False)
    with _eval_mode(model), torch.no_grad(), cast, bar:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            ids, mask = pad_left([rendered[i] for i in rows], tokenizer.pad_token_id)
            counted = mask.clone()
            for r, i in enumerate(rows):  # left padding: text starts at longest - length
                counted[r, : ids.shape[1] - len(rendered[i]) + starts[i]] = 0
            counted = counted.to(model.device)
            with _read_layers(model, blocks, layers, lambda h, counted=counted: _pool(h, counted, position)) as read:
                try:
                    model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
                except _Deep:
                    pass
            batch = torch.stack([read[layer] for layer in layers], dim=1).cpu().numpy()
            if values is None:
                values = np.empty((len(prompts), *batch.shape[1:]), dtype=np.float32)
            values[rows] = batch
            bar.update(len(rows))
    if not np.isfinite(values).all():
        raise ValueError("activations are not finite: load the model in float32 or bfloat16 instead of float16")
    return Activations(values, tuple(layers), position)


@contextmanager
def _eval_mode(model):
    """Dropout off; the model goes back to training, if it was, whatever happens."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _pool(hidden: torch.Tensor, counted: torch.Tensor, position: str) -> torch.Tensor:
    """``(batch, length, width)`` -> ``(batch, width)`` float32; texts end at the right edge."""
    if position == "last":
        return hidden[:, -1].float()
    weights = counted[..., None].float()
    return (hidden.float() * weights).sum(1) / weights.sum(1)


@contextmanager
def _read_layers(model, blocks, layers: list[int], pool):
    """Pooled outputs of the layers asked for; hooks exist inside this block only."""
    read: dict[int, torch.Tensor] = {}
    handles = []

    def keep(layer: int, hidden) -> None:
        read[layer] = pool(hidden[0] if isinstance(hidden, tuple) else hidden)
        if layer == layers[-1]:
            raise _Deep

    try:
        for layer in layers:
            if layer == 0:  # what enters the first block: embeddings, scaled where the family scales them

                def enter(_, args, kwargs):
                    keep(0, args[0] if args else kwargs["hidden_states"])

                handles.append(blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
            else:
                handles.append(blocks[layer - 1].register_forward_hook(lambda _, __, out, layer=layer: keep(layer, out)))
        yield read
    finally:
        for handle in handles:
            handle.remove()
