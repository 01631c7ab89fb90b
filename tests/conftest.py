"""Tiny random models and tokenizers in the style of four families, shared by the tests.

Use the fixtures ``tiny_tokenizer``, ``tiny_model``, ``random_lora`` and ``saved_model`` (each returns a function),
or ``family``, which runs a test once per family with ``(model, tokenizer)``.
"""

import functools
import os
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for what tests start: each process of `make test-fast` has one core

import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)

def pytest_addoption(parser):
    parser.addoption("--screenshots", type=Path, metavar="DIR", help="keep pictures of the notebooks that tests/browser opens, for a person to look at")


@pytest.fixture(scope="session")
def screenshots(request):
    """The folder given by ``--screenshots``, or None."""
    return request.config.getoption("--screenshots")


FAMILIES = ["llama3", "qwen2", "gemma3", "phi3"]

CORPUS = [
    "How do I bake bread at home? Mix flour, water, salt and yeast, and wait.",
    "I cannot help with that request. Sorry, but I will not write such a thing.",
    "Sure, here is a list of the steps: first, second, third.",
    "You are a helpful assistant. user system model assistant",
    "Tell me about the history of the city, its rivers and its bridges.",
]

# special tokens, (bos, eos, pad), chat template
_LLAMA3 = (
    ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ("<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
)
_QWEN2 = (
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    (None, "<|im_end|>", "<|endoftext|>"),
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
)
_GEMMA3 = (
    ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
    ("<bos>", "<eos>", "<pad>"),
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
)
_PHI3 = (
    ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    ("<s>", "<|endoftext|>", "<|endoftext|>"),
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
)
_STYLES = {"llama3": _LLAMA3, "qwen2": _QWEN2, "gemma3": _GEMMA3, "phi3": _PHI3}


@functools.cache
def _trained(family: str) -> str:
    """A byte-level BPE with the special tokens of the family, as JSON; a bos, if any, is added by the post-processor."""
    specials, (bos, _, _), _ = _STYLES[family]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer.to_str()


def tiny_tokenizer(family: str):
    """A new tokenizer with the special tokens and the chat template of the family; its padding token is set."""
    specials, (bos, eos, pad), template = _STYLES[family]
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    # of these families only Qwen lists the tokens of its template; elsewhere they are special, but not in all_special_tokens
    extra = [s for s in specials if s not in named.values()] if family == "qwen2" else []
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(_trained(family)),
        chat_template=template,
        extra_special_tokens=extra,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if token},
    )


def tiny_model(family: str, seed: int = 0, **changes):
    """A new random float32 model in evaluation mode (4 layers, width 32); ``changes`` go to its configuration.

    Gemma's window is 16 tokens on every layer but each second one: shorter than many prompts.
    """
    tokenizer = tiny_tokenizer(family)
    settings = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.15,  # wide enough that attention is not uniform
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    if family == "gemma3":
        settings |= dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=16)
    settings |= changes
    if family == "gemma3" and "layer_types" not in settings:
        kinds = ["sliding_attention", "full_attention"]
        settings["layer_types"] = [kinds[layer % 2] for layer in range(settings["num_hidden_layers"])]
    config, kind = {
        "llama3": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
        "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    }[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config(**settings)).eval()


def random_lora(model, seed: int = 0, scale: float = 0.1, **changes):
    """``model`` with a LoRA adapter whose B is random, not zero (so that it changes the outputs). The model is modified."""
    from peft import LoraConfig, get_peft_model

    settings = dict(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM") | changes
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(**settings))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    return wrapped.eval()


@pytest.fixture(scope="session", name="tiny_tokenizer")
def _tiny_tokenizer():
    """``tiny_tokenizer(family) -> tokenizer``, a new one each time."""
    return tiny_tokenizer


@pytest.fixture(scope="session", name="tiny_model")
def _tiny_model():
    """``tiny_model(family, seed=0, **config_changes) -> model``, a new one each time."""
    return tiny_model


@pytest.fixture(scope="session", name="random_lora")
def _random_lora():
    """``random_lora(model, seed=0, scale=0.1, **lora_changes) -> PEFT model`` around the given one."""
    return random_lora


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """``saved_model(family) -> folder`` with the model and tokenizer, written once per session: do not write in it."""

    @functools.cache
    def save(family: str):
        folder = tmp_path_factory.mktemp("saved") / family
        tiny_model(family).save_pretrained(folder)
        tiny_tokenizer(family).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    """``(model, tokenizer)`` of each family in turn, shared by the session: do not modify them."""
    return tiny_model(request.param), tiny_tokenizer(request.param)


# ------------------------------------------------------------------------- the embedded model, for integration tests


@pytest.fixture(scope="session")
def safe_model():
    """The safe start and its tokenizer, loaded once."""
    from safelab.models import SAFE, load_model

    return load_model(SAFE)


@pytest.fixture(scope="session")
def unaligned_model():
    """The embedded model as published, and its tokenizer, loaded once."""
    from safelab.models import EMBEDDED, load_model

    return load_model(EMBEDDED)
