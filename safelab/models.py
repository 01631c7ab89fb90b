"""A name -> (model, tokenizer); and prompts -> token ids, through the model's own chat template.

A name is a registered one (:data:`EMBEDDED`, :data:`SAFE`), a local folder, a ``.gguf`` file, or a hub
id. Weights are read from safetensors or GGUF only, and no remote code is ever run.
"""

from __future__ import annotations

import logging
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safelab.sources import atomic_dir, cache_dir, data_dir, fetch_member, hub_snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m-instruct"
"""The embedded model as published: it answers almost everything."""
SAFE = "smollm2-135m-instruct-safe"
"""The embedded model with the adapter in ``data/safe-adapter`` merged in: the aligned start."""

DTYPES = ("auto", "float32", "bfloat16", "float16")

FALLBACK_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""Given to tokenizers without a chat template: plain ``User: ... / Assistant: ...`` turns."""


def load_model(
    name: str | Path = SAFE,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready for evaluation.

    Parameters
    ----------
    name
        :data:`EMBEDDED`, :data:`SAFE`, a folder, a ``.gguf`` file or a hub id, in this order of precedence.
    adapter
        A PEFT adapter folder to put on top (kept as an adapter, not merged).
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"auto"``: what the checkpoint holds on an
        accelerator, float32 on a CPU and for :data:`SAFE`, whose small changes half precision would round off.
    device
        Default: an accelerator if there is one, else the CPU.

    Raises
    ------
    ModelError
        The name cannot be resolved, or its files are damaged.
    safelab.sources.SourceError
        The bytes cannot be fetched.
    """
    import torch

    if device is None:
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    torch_dtype = "auto" if dtype == "auto" and device != "cpu" and str(name) != SAFE else torch.float32 if dtype == "auto" else getattr(torch, dtype)
    folder, gguf = _resolve(str(name))
    model, tokenizer = _from_pretrained(folder, gguf, torch_dtype)
    if str(name) == SAFE:
        model = _merged(model, data_dir() / "safe-adapter")
    if adapter is not None:
        model = _with_adapter(model, adapter)
    prepare_tokenizer(tokenizer)
    return model.to(device).eval(), tokenizer


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message says what to do."""


def _resolve(name: str) -> tuple[Path, str | None]:
    """Name -> (folder, gguf file name in it or None)."""
    if name in (EMBEDDED, SAFE):
        return _converted_embedded(), None
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {path}: check the path")
        check_gguf(path)
        return path.parent, path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json: give the folder of a saved model, or a .gguf file")
        return path, None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(
            f"no model called {name!r}: give {EMBEDDED!r}, {SAFE!r}, a folder, a .gguf file, "
            "or a hub id such as 'Qwen/Qwen2.5-0.5B-Instruct'"
        )
    return hub_snapshot(name), None


def _from_pretrained(folder: Path, gguf: str | None, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extra = {"gguf_file": gguf} if gguf else {"use_safetensors": True}
    with _quiet_loading():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **({"gguf_file": gguf} if gguf else {}))
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **extra)
        except Exception as error:  # what is raised for a damaged file differs by format and version
            raise ModelError(
                f"cannot load the model in {folder}: {type(error).__name__}: {error}. "
                "If a file is damaged, fetch or copy it again; only safetensors and GGUF weights are read"
            ) from error
    return model, tokenizer


def _converted_embedded() -> Path:
    """The embedded model as a plain folder: de-quantised from its GGUF once, safetensors afterwards.

    The weights are kept in bfloat16: their 4-bit origin is far coarser than that rounding.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    final = cache_dir() / "models" / EMBEDDED
    if final.is_dir():
        return final
    gguf = fetch_member(EMBEDDED)
    check_gguf(gguf)
    logger.info("converting %s to safetensors, once", gguf.name)
    with atomic_dir(final) as folder, _quiet_loading():
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # a de-quantised model refuses save_pretrained, so its weights move into a plain one
        vars(config).pop("quantization_config", None)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict())
        plain.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return final


def check_gguf(path: Path) -> None:
    """Raise :class:`ModelError` unless ``path`` is a GGUF file whose tensors all lie inside it."""
    try:
        from gguf import GGUFReader

        tensors = GGUFReader(path).tensors
        end = max(int(t.data_offset) + int(t.n_bytes) for t in tensors)
    except (ValueError, IndexError, KeyError, OSError, struct.error, TypeError, OverflowError) as error:
        raise ModelError(f"{path} is not a readable GGUF file ({error}): it may be cut short; fetch or copy it again") from error
    if end > path.stat().st_size:
        raise ModelError(f"{path} is cut short: {path.stat().st_size:,} bytes, but its tensors need {end:,}; fetch or copy it again")


def _with_adapter(model, adapter: str | Path):
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder} is not a PEFT adapter: adapter_config.json and adapter_model.safetensors are needed")
    try:
        model = PeftModel.from_pretrained(model, folder)
        with safe_open(folder / "adapter_model.safetensors", "np") as file:
            stored = set(file.keys())
    except Exception as error:
        raise ModelError(f"the adapter in {folder} does not fit this model: {error}") from error
    # PEFT loads what fits and leaves the rest: silent where another model's adapter shares a few module names
    unmatched = {key for key in stored ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)) if "lora_" in key}
    if unmatched:
        raise ModelError(
            f"the adapter in {folder} does not fit this model: {len(unmatched)} tensors have no counterpart, such as {min(unmatched)}"
        )
    return model


def _merged(model, adapter: Path):
    return _with_adapter(model, adapter).merge_and_unload()


def bf16_is_fast(device: str = "cpu") -> bool:
    """Whether bfloat16 autocast pays on a kind of device: on a CPU only where it has instructions for it (AVX512-BF16, AMX, ARM's BF16).

    Without them a matrix product takes several times as long as in float32, six to seven times on a CPU with AVX2.
    """
    import torch

    if device != "cpu":
        return True
    if not hasattr(torch.cpu, "get_capabilities"):  # older releases tell less
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@contextmanager
def frozen_in_half(*models):
    """Inside, frozen linear layers hold the bfloat16 weights that autocast would make of them anew at their every use.

    The numbers are the same, and with few tokens at a time the casts are a good part of the work. Outside, and whatever
    happens, the layers have their own weights; so has an embedding that is tied to the head.
    """
    import torch

    layers = [m for model in models for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.dtype == torch.float32 and not m.weight.requires_grad]
    own = [layer.weight for layer in layers]
    try:
        for layer in layers:
            layer.weight = torch.nn.Parameter(layer.weight.bfloat16(), requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, own):
            layer.weight = weight


@contextmanager
def _quiet_loading():
    """Loading bars of transformers off; always restored."""
    from transformers.utils import logging as hf_logging

    was_on, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if was_on:
            hf_logging.enable_progress_bar()


@contextmanager
def eval_mode(model):
    """Dropout off; the model goes back to training, if it was, whatever happens."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def decoder_layers(model):
    """The list of transformer blocks of a causal model, with or without a PEFT adapter around it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    return decoder.layers


# ------------------------------------------------------------------------------------------- chat


def prepare_tokenizer(tokenizer) -> None:
    """Give the tokenizer a padding token and, if it has none, a plain chat template (with a warning).

    Raises
    ------
    ModelError
        It has neither a padding nor an end-of-sequence token.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError("the tokenizer has neither a padding nor an end-of-sequence token: set tokenizer.eos_token and save it")
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        logger.warning("the tokenizer has no chat template: plain 'User: ... Assistant: ...' turns are used")
        tokenizer.chat_template = FALLBACK_TEMPLATE


@dataclass(frozen=True)
class Rendered:
    """One example as token ids: ``input_ids[:prompt_length]`` is the prompt, the rest the response."""

    input_ids: list[int]
    prompt_length: int


# Stand-ins for user text while the template is rendered: characters that no text uses and no template strips.
_USER, _SYSTEM, _RESPONSE = "\ue0f1\ue0f2\ue0f1", "\ue0f3\ue0f4\ue0f3", "\ue0f5\ue0f6\ue0f5"


def render_prompts(tokenizer, prompts: list[str], *, system: str | None = None, max_length: int | None = None) -> list[list[int]]:
    """Prompts -> token ids up to and including the template's generation prompt.

    Only the template itself may produce special tokens: inside a user's text they are ordinary characters,
    so that a prompt containing the end-of-turn marker does not end the turn.

    Raises
    ------
    ValueError
        A prompt is empty, not a string, or longer than ``max_length`` tokens once rendered.
    """
    frame = _frame(tokenizer, system, response=False)
    rendered = []
    for index, prompt in enumerate(prompts):
        _check_text(prompt, index, "prompt")
        ids = _fill(tokenizer, frame, {_USER: prompt, _SYSTEM: system or ""})
        if max_length is not None and len(ids) > max_length:
            raise ValueError(f"prompt {index} has {len(ids):,} tokens, but the limit is {max_length:,}: shorten it ({prompt[:40]!r}...)")
        rendered.append(ids)
    return rendered


def render_pairs(
    tokenizer,
    prompts: list[str],
    responses: list[str],
    *,
    complete: list[bool] | None = None,
    system: str | None = None,
    max_length: int | None = None,
) -> list[Rendered]:
    """(prompt, response) -> token ids, the end-of-turn token included in a response unless ``complete`` says it goes on.

    A pair longer than ``max_length`` loses the end of its response; a prompt that leaves no room for a
    response raises ValueError.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    special = _special_strings(tokenizer)
    end = end_of_turn_ids(tokenizer, system)
    pairs = []
    for index, (ids, response) in enumerate(zip(render_prompts(tokenizer, prompts, system=system), responses, strict=True)):
        _check_text(response, index, "response")
        if max_length is not None and len(ids) >= max_length:
            raise ValueError(f"prompt {index} has {len(ids):,} tokens and leaves no room for a response within {max_length:,}")
        hostile = any(s in response for s in special)
        tokens = ids + (_plain_ids(tokenizer, response) if hostile else tokenizer(response, add_special_tokens=False).input_ids)
        if complete is None or complete[index]:
            tokens += end
        pairs.append(Rendered(tokens[:max_length], len(ids)))
    return pairs


def end_of_turn_ids(tokenizer, system: str | None = None) -> list[int]:
    """What the template puts after a response, up to its first special token: what ends the turn."""
    after = _frame(tokenizer, system, response=True).split(_RESPONSE)[1]
    ids = tokenizer(after, add_special_tokens=False).input_ids
    special = tokenizer.convert_tokens_to_ids(_special_strings(tokenizer))
    for position, token in enumerate(ids):
        if token in special:
            return ids[: position + 1]
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids


def _check_text(text, index: int, what: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{what} {index} is {type(text).__name__}, expected text")
    if not text.strip():
        raise ValueError(f"{what} {index} is empty")


def _frame(tokenizer, system: str | None, *, response: bool) -> str:
    """The template rendered around stand-ins; a system text folds into the user turn where there is no such role."""
    from jinja2 import TemplateError

    def render(messages):
        if response:
            messages = [*messages, {"role": "assistant", "content": _RESPONSE}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not response)

    if system:
        try:
            text = render([{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}])
            if _SYSTEM in text:
                return text
        except TemplateError:
            pass
        return render([{"role": "user", "content": f"{_SYSTEM}\n\n{_USER}"}])
    return render([{"role": "user", "content": _USER}])


def _special_strings(tokenizer) -> list[str]:
    # not tokenizer.all_special_tokens: Gemma 3 and Phi-3 do not list their end of turn there
    return [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]


def _plain_ids(tokenizer, text: str) -> list[int]:
    """Text -> token ids, special tokens in it being ordinary characters."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    tokenizer("", add_special_tokens=False)  # the backend keeps that setting until the next call
    return ids


def _fill(tokenizer, frame: str, texts: dict[str, str]) -> list[int]:
    special = _special_strings(tokenizer)
    if not any(s in text for text in texts.values() for s in special):
        for mark, text in texts.items():
            frame = frame.replace(mark, text.strip())
        return tokenizer(frame, add_special_tokens=False).input_ids
    ids: list[int] = []
    while frame:
        found = [(frame.find(mark), mark) for mark in texts if mark in frame]
        if not found:
            return ids + tokenizer(frame, add_special_tokens=False).input_ids
        start, mark = min(found)
        if start:
            ids += tokenizer(frame[:start], add_special_tokens=False).input_ids
        ids += _plain_ids(tokenizer, texts[mark].strip())
        frame = frame[start + len(mark) :]
    return ids


def pad_left(sequences: list[list[int]], pad_id: int):
    """Token id lists -> (input_ids, attention_mask), both ``(n, longest)`` int64, padded on the left."""
    import torch

    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    return ids, mask
