"""Prompts -> Activations (examples x layers x width): what a model computes before it writes a word.

Layer 0 is the embedding output, layer l the output of transformer block l (before the final norm). Texts are sorted
by length into batches of about as many tokens each, what they all begin with is read once, the forward pass stops after
the deepest layer asked for, and only the positions asked for are kept, so memory grows with the result and not with layers x tokens x prompts. With
``cache=True`` not even the result is held in memory: it is written to a file batch by batch, and mapped.
"""

from __future__ import annotations

import hashlib
import json
import struct
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import DynamicCache

from safelab.models import bf16_is_fast, decoder_layers, eval_mode, frozen_in_half, render_pairs, render_prompts
from safelab.sources import atomic_path, cache_dir, explained

POSITIONS = ("last", "mean", "all")


@dataclass(frozen=True)
class Activations:
    """``values`` ``(examples, layers, width)`` float32 and the layer numbers of its second axis.

    At position ``"all"`` the first axis runs over the tokens of all texts, one text after the other, and
    ``offsets`` ``(examples + 1,)`` says where each begins.
    """

    values: np.ndarray
    layers: tuple[int, ...]
    position: str
    offsets: np.ndarray | None = None

    def layer(self, number: int) -> np.ndarray:
        """``(examples, width)`` of one layer; ValueError if it was not extracted."""
        if number not in self.layers:
            raise ValueError(f"layer {number} was not extracted; there are {', '.join(map(str, self.layers))}")
        return self.values[:, self.layers.index(number)]

    def select(self, layers: list[int]) -> Activations:
        """The same with these layers only; ValueError if one was not extracted."""
        return Activations(np.stack([self.layer(number) for number in layers], axis=1), tuple(layers), self.position, self.offsets)

    def concatenated(self) -> np.ndarray:
        """``(examples, layers x width)``: the layers side by side."""
        return self.values.reshape(len(self.values), -1)

    def pooled(self) -> np.ndarray:
        """``(examples, width)``: the mean over the layers."""
        return self.values.mean(axis=1)

    def tokens(self, text: int) -> np.ndarray:
        """``(tokens, layers, width)`` of one text; ValueError unless the position is ``"all"``."""
        if self.offsets is None:
            raise ValueError(f'tokens are kept at position "all", not at {self.position!r}')
        return self.values[self.offsets[text] : self.offsets[text + 1]]


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
    half: bool | None = None,
    batch_tokens: int | None = None,
    cache: bool = False,
    progress: str | None = None,
) -> Activations:
    """Hidden states of prompts (or prompt + response).

    Parameters
    ----------
    responses
        Given: the text is prompt + response + end of turn. Otherwise: the prompt through the template's generation
        prompt, so that ``"last"`` is the state from which the first response token would be written.
    layers
        0 (embeddings) to the number of blocks; default all.
    position
        ``"last"`` token, the ``"mean"`` over the tokens of the text, or ``"all"`` of them (of the response, where one
        is given).
    half
        bfloat16 autocast; default on a CPU where it is faster (:func:`safelab.models.bf16_is_fast`). The result is float32 either way.
    batch_tokens
        A batch holds at most so many tokens, padding included and the shared beginning left out, or a single text;
        default 512 on a CPU, where more is no faster, and 8192 elsewhere.
    cache
        Keep the result on disk, keyed by the model's weights, the texts' tokens and the settings, and return it
        memory-mapped: asked for again, it is read instead of computed. Some layers are found where all were kept.

    Raises
    ------
    ValueError
        No prompts, a text longer than the model's context, an unknown layer or position, or activations that are not
        finite; a cached file that holds something else than its name says. Nothing is cached then.
    """
    blocks = decoder_layers(model)
    layers = list(range(len(blocks) + 1)) if layers is None else sorted(set(layers))
    if not prompts:
        raise ValueError("no prompts to extract activations from")
    if position not in POSITIONS:
        raise ValueError(f"position {position!r}: expected one of {', '.join(POSITIONS)}")
    if not layers or layers[0] < 0 or layers[-1] > len(blocks):
        raise ValueError(f"layers {layers}: this model has 0 (embeddings) to {len(blocks)}")
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if responses is None:
        texts = render_prompts(tokenizer, prompts, max_length=context)
        starts = [0] * len(texts)
    else:
        pairs = render_pairs(tokenizer, prompts, responses, max_length=context)
        texts, starts = [p.input_ids for p in pairs], [p.prompt_length for p in pairs]
    on_cpu = model.device.type == "cpu"
    half = on_cpu and bf16_is_fast() if half is None else half
    batch_tokens = batch_tokens or (512 if on_cpu else 8192)
    offsets = np.cumsum([0, *(len(t) - s if position == "all" else 1 for t, s in zip(texts, starts))])
    shape = (int(offsets[-1]), len(layers), config.hidden_size)

    def fill(values: np.ndarray) -> None:
        cast = torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False) if half else nullcontext()
        weights = frozen_in_half(model) if half else nullcontext()
        bar = tqdm(total=len(texts), desc=progress, disable=progress is None, unit="prompt", leave=False)
        with eval_mode(model), torch.no_grad(), weights, cast, bar:
            # what all texts begin with, mostly the template's opening, is read once and kept as keys and values
            shared = shared_beginning(texts, starts) if layers[-1] else 0
            past, head = DynamicCache(config=config), {}
            if shared:
                head = _read(model, blocks, layers, torch.tensor([texts[0][:shared]]), past, lambda layer, h: h[0].float())
            for rows in _batches([len(t) - shared for t in texts], batch_tokens):
                # padded on the right and without a mask: nothing in a causal model looks that way
                ids = pad_sequence([torch.tensor(texts[i][shared:]) for i in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
                spans = [(max(starts[i] - shared, 0), len(texts[i]) - shared) for i in rows]
                heads = {} if responses is not None else head  # of a prompt all tokens count

                def pool(layer, hidden, spans=spans, heads=heads):
                    return _pool(hidden, spans, position, heads.get(layer))

                with _for_a_batch(past, blocks, len(rows)):
                    read = _read(model, blocks, layers, ids, past, pool)
                batch = torch.stack([read[layer] for layer in layers], dim=1).cpu().numpy()
                if not np.isfinite(batch).all():
                    raise ValueError("activations are not finite: load the model in float32 or bfloat16 instead of float16")
                values[np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in rows])] = batch
                bar.update(len(rows))

    if cache:
        about = {"model": model_fingerprint(model), "texts": _hash(texts, starts), "layers": layers, "position": position, "half": half}
        every = list(range(len(blocks) + 1))
        whole = kept_array("activations", about | {"layers": every}, (shape[0], len(every), shape[2])) if layers != every else None
        values = mapped_array("activations", about, shape, fill) if whole is None else whole[:, layers]
    else:
        values = np.empty(shape, dtype=np.float32)
        fill(values)
    return Activations(values, tuple(layers), position, offsets if position == "all" else None)


def shared_beginning(texts: list[list[int]], starts: list[int]) -> int:
    """How many tokens all texts begin with; each keeps one of its own at least, and a response, which begins at its start, all of them."""
    longest = min(start or len(text) - 1 for text, start in zip(texts, starts))
    first, last = min(texts), max(texts)  # what these two share, all do
    return next((i for i in range(longest) if first[i] != last[i]), longest)


def _batches(lengths: list[int], batch_tokens: int):
    """Indices of texts, sorted by length, cut so that rows x longest stays within ``batch_tokens``."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _pool(hidden: torch.Tensor, spans: list[tuple[int, int]], position: str, head: torch.Tensor | None) -> torch.Tensor:
    """``(batch, length, width)`` -> ``(batch, width)``, or ``(tokens, width)`` for ``"all"``; float32. ``head`` goes before each text."""
    if position == "last":
        return hidden[range(len(spans)), [end - 1 for _, end in spans]].float()
    counted = [row[start:end].float() for row, (start, end) in zip(hidden, spans)]
    if head is not None:
        counted = [torch.cat([head, tokens]) for tokens in counted]
    return torch.cat(counted) if position == "all" else torch.stack([tokens.mean(0) for tokens in counted])


def _read(model, blocks, layers: list[int], ids: torch.Tensor, past: DynamicCache, pool) -> dict[int, torch.Tensor]:
    """``pool(layer, hidden)`` of each layer asked for, from one forward pass after ``past``, which grows; hooks exist inside only."""
    read: dict[int, torch.Tensor] = {}
    handles = []

    def keep(layer: int, hidden) -> None:
        read[layer] = pool(layer, hidden[0] if isinstance(hidden, tuple) else hidden)
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
        model(input_ids=ids.to(model.device), past_key_values=past, use_cache=True)
    except _Deep:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return read


@contextmanager
def _for_a_batch(past: DynamicCache, blocks, n: int):
    """``past``, of one text, seen as that of ``n``, and given back as it was; what a block adds is dropped as soon as it has run."""
    before = [dict(vars(layer)) for layer in past.layers]

    def restore(number: int) -> None:
        vars(past.layers[number]).clear()
        vars(past.layers[number]).update(before[number])

    handles = [block.register_forward_hook(lambda *_, number=number: restore(number), prepend=True) for number, block in enumerate(blocks)]
    try:
        for layer in past.layers:
            if layer.get_seq_length():  # views: nothing is copied
                layer.keys, layer.values = (t.expand(n, -1, -1, -1) for t in (layer.keys, layer.values))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for number in range(len(before)):
            restore(number)


# ---------------------------------------------------------------------------------------------- identity

# what differs between copies of one model that compute the same
_INCIDENTAL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def model_fingerprint(model) -> str:
    """Hash of what a model computes with: its configuration, every weight, and the adapters that are on.

    A PEFT model whose adapter is off has the fingerprint of the model inside.
    """
    active, scaling = set(), {}
    for name, module in model.named_modules():
        if hasattr(module, "disable_adapters") and not module.disable_adapters:
            active |= {*module.active_adapters}
            scaling |= {f"{name}.{a}": getattr(module, "scaling", {}).get(a) for a in module.active_adapters}
    weights = {}
    for name, tensor in model.state_dict().items():
        adapter = name.rpartition(".lora_")[2].split(".")[1] if ".lora_" in name else None
        if adapter is None or adapter in active:
            weights[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    config = {k: v for k, v in model.config.to_dict().items() if k not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps([config, sorted(scaling.items())], sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def template_fingerprint(tokenizer) -> str:
    """Hash of a tokenizer's chat template."""
    return _hash(tokenizer.chat_template)


def _hash(*values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


# ----------------------------------------------------------------------------------------------- the cache


def mapped_array(folder: str, about: dict, shape: tuple[int, ...], fill) -> np.ndarray:
    """The cached float32 array of ``about``, read-only and memory-mapped; made by ``fill(array)`` where there is none, or a broken one."""
    if (values := kept_array(folder, about, shape)) is None:
        path = _file_of(folder, about)
        with atomic_path(path) as temp:
            values = _create(temp, about, shape)
            fill(values)
            values.flush()
        values = _open(path, about, shape)
    return values


def kept_array(folder: str, about: dict, shape: tuple[int, ...]) -> np.ndarray | None:
    """What :func:`mapped_array` has kept under that name; None where there is nothing, or something broken."""
    path = _file_of(folder, about)
    return _open(path, about, shape) if path.is_file() else None


def _file_of(folder: str, about: dict) -> Path:
    return cache_dir() / folder / f"{_hash(about)}.safetensors"


_BLOCK = 1 << 24


def _create(path: Path, about: dict, shape: tuple[int, ...]) -> np.memmap:
    """A safetensors file with room for one float32 array, open for writing."""
    size = 4 * int(np.prod(shape))
    header = json.dumps({"__metadata__": {"about": json.dumps(about)}, "values": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)  # data begins on a multiple of eight, as the format asks
    with explained("activations", size, path.parent), path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, size, _BLOCK):  # no holes: writing into one kills the process where the disk is full
            file.write(bytes(min(_BLOCK, size - start)))
    return np.memmap(path, np.float32, "r+", offset=8 + len(header), shape=shape)


def _open(path: Path, about: dict, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array in ``path``; None if the file is broken, ValueError if it holds another model's or other texts' states."""
    try:
        with safe_open(path, "pt") as file:  # this framework maps the file, numpy's copies it
            found, values = json.loads(file.metadata()["about"]), file.get_tensor("values")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    if found != about:
        differing = ", ".join(k for k in about if found.get(k) != about[k])
        raise ValueError(f"{path} holds the values of something else (differing: {differing}): it was renamed or edited; delete it")
    values = values.numpy()
    values.flags.writeable = False
    return values if values.shape == shape else None
