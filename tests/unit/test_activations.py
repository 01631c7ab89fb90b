"""Activations: the same numbers as one prompt at a time, and as transformers' own hidden states."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES

from safelab import activations
from safelab.activations import Activations, extract_activations, model_fingerprint, template_fingerprint
from safelab.models import bf16_is_fast, decoder_layers, render_pairs, render_prompts
from safelab.sources import SourceError

# From one token to several hundred, not sorted: batches pad a lot, and Gemma's window of 16 tokens is exceeded.
PROMPTS = [
    "Tell me about the history of the city, its rivers and its bridges. " * 6,
    "x",
    "How do I bake bread at home?",
    "日本語 🍞",
    "Mix flour, water, salt and yeast, and wait. Then first, second, third." * 3,
    "Why?",
    "Sorry, but I will not write such a thing.",
]
RESPONSES = ["No.", "Sure, here is a list of the steps. " * 5, "y", "I cannot help with that.", "Mix.", "🍞" * 40, "a b"]


@pytest.fixture
def small(tiny_model, tiny_tokenizer):
    return tiny_model("llama3"), tiny_tokenizer("llama3")


@torch.no_grad()
def block_outputs(model, ids: list[int]) -> np.ndarray:
    """``(layers + 1, tokens, width)`` of one unpadded text: hidden states, the last before the final norm."""
    before_norm = []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = base.model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    try:
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    finally:
        handle.remove()
    return torch.cat([*states[:-1], before_norm[0]]).numpy()


def pooled(states: np.ndarray, position: str, start: int = 0) -> np.ndarray:
    return states[:, -1] if position == "last" else states[:, start:].astype(np.float64).mean(1)


def hooks(model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("position", ["last", "mean"])
def test_a_padded_batch_gives_what_each_prompt_gives_alone(family, position):
    model, tokenizer = family
    ids = render_prompts(tokenizer, PROMPTS)
    assert min(map(len, ids)) < 40 and max(map(len, ids)) > 150
    got = extract_activations(model, tokenizer, PROMPTS, position=position, half=False, batch_tokens=10**6)
    expected = np.stack([pooled(block_outputs(model, row), position) for row in ids])
    assert got.values.shape == (len(PROMPTS), 5, 32) and got.values.dtype == np.float32
    assert got.layers == (0, 1, 2, 3, 4) and got.position == position
    np.testing.assert_allclose(got.values, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("position", ["last", "mean"])
def test_with_responses_the_position_is_over_the_response(family, position):
    model, tokenizer = family
    pairs = render_pairs(tokenizer, PROMPTS, RESPONSES)
    got = extract_activations(model, tokenizer, PROMPTS, RESPONSES, position=position, half=False, batch_tokens=300)
    expected = np.stack([pooled(block_outputs(model, p.input_ids), position, p.prompt_length) for p in pairs])
    np.testing.assert_allclose(got.values, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("adapter", ["none", "on", "off"])
def test_all_tokens_are_those_of_each_text_alone(name, adapter, tiny_model, tiny_tokenizer, random_lora):
    model, tokenizer = tiny_model(name), tiny_tokenizer(name)
    if adapter != "none":
        model = random_lora(model)
    if adapter == "off":
        model.base_model.disable_adapter_layers()
    for responses, texts in (
        (None, [(ids, 0) for ids in render_prompts(tokenizer, PROMPTS)]),
        (RESPONSES, [(p.input_ids, p.prompt_length) for p in render_pairs(tokenizer, PROMPTS, RESPONSES)]),
    ):
        got = extract_activations(model, tokenizer, PROMPTS, responses, position="all", layers=[0, 2, 4], half=False, batch_tokens=600)
        assert got.values.shape == (sum(len(ids) - start for ids, start in texts), 3, 32)
        for i, (ids, start) in enumerate(texts):
            expected = block_outputs(model, ids)[[0, 2, 4], start:].transpose(1, 0, 2)
            np.testing.assert_allclose(got.tokens(i), expected, rtol=0, atol=1e-4)
        last = extract_activations(model, tokenizer, PROMPTS, responses, layers=[0, 2, 4], half=False)
        mean = extract_activations(model, tokenizer, PROMPTS, responses, layers=[0, 2, 4], half=False, position="mean")
        np.testing.assert_allclose([got.tokens(i)[-1] for i in range(len(PROMPTS))], last.values, rtol=0, atol=1e-4)
        np.testing.assert_allclose([got.tokens(i).mean(0) for i in range(len(PROMPTS))], mean.values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_counts_when_it_is_on_and_only_then(name, tiny_model, tiny_tokenizer, random_lora):
    tokenizer = tiny_tokenizer(name)
    plain = extract_activations(tiny_model(name), tokenizer, PROMPTS, half=False)
    tuned = random_lora(tiny_model(name))
    on = extract_activations(tuned, tokenizer, PROMPTS, half=False)
    expected = np.stack([pooled(block_outputs(tuned, ids), "last") for ids in render_prompts(tokenizer, PROMPTS)])
    np.testing.assert_allclose(on.values, expected, rtol=0, atol=1e-4)
    assert (np.abs(on.values - plain.values)[:, 1:].max(axis=(0, 2)) > 0.05).all(), "the adapter changes each block"
    with tuned.disable_adapter():
        off = extract_activations(tuned, tokenizer, PROMPTS, half=False)
    np.testing.assert_allclose(off.values, plain.values, rtol=0, atol=1e-5)


def test_the_last_layer_is_before_the_final_norm(family):
    model, tokenizer = family
    last = extract_activations(model, tokenizer, PROMPTS, half=False, layers=[4]).values[:, 0]
    with torch.no_grad():
        normed = model.model.norm(torch.from_numpy(last))
        for row, ids in zip(normed, render_prompts(tokenizer, PROMPTS), strict=True):
            torch.testing.assert_close(model.lm_head(row), model(torch.tensor([ids])).logits[0, -1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("layers", [[0], [4], [1, 3], [3, 1, 3], [0, 2], (4, 0)])
def test_chosen_layers_are_a_slice_of_all(small, layers):
    model, tokenizer = small
    every = extract_activations(model, tokenizer, PROMPTS, half=False)
    some = extract_activations(model, tokenizer, PROMPTS, half=False, layers=layers)
    assert some.layers == tuple(sorted(set(layers)))
    np.testing.assert_array_equal(some.values, every.values[:, some.layers])
    for layer in some.layers:
        np.testing.assert_array_equal(some.layer(layer), every.layer(layer))


@pytest.mark.parametrize("layers, blocks_run", [([0], [0, 0, 0, 0]), ([1], [1, 0, 0, 0]), ([0, 3], [1, 1, 1, 0]), (None, [1, 1, 1, 1])])
@pytest.mark.parametrize("adapter", [False, True])
def test_nothing_runs_past_the_deepest_layer(small, random_lora, layers, blocks_run, adapter):
    model, tokenizer = small
    blocks = decoder_layers(model)
    head = model.lm_head
    model = random_lora(model) if adapter else model
    runs = []
    for number, module in enumerate([*(block.mlp for block in blocks), head]):
        module.register_forward_hook(lambda *_, number=number: runs.append(number))
    extract_activations(model, tokenizer, PROMPTS[:3], layers=layers, batch_tokens=10**6)
    assert [runs.count(number) for number in range(5)] == [*(2 * run for run in blocks_run), 0], "for what all share, and for the batch"


def test_results_come_in_the_order_of_the_prompts(small):
    model, tokenizer = small
    one = extract_activations(model, tokenizer, PROMPTS, half=False, batch_tokens=1).values
    for batch_tokens in (100, 500, 10**6):
        got = extract_activations(model, tokenizer, PROMPTS, half=False, batch_tokens=batch_tokens).values
        np.testing.assert_allclose(got, one, rtol=0, atol=1e-4)
    backwards = extract_activations(model, tokenizer, PROMPTS[::-1], half=False, batch_tokens=200).values
    np.testing.assert_allclose(backwards[::-1], one, rtol=0, atol=1e-4)
    assert len(np.unique(one[:, -1].round(3), axis=0)) == len(PROMPTS), "the prompts should differ, or their order cannot show"


@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_is_the_default_on_a_cpu_that_has_it_and_close(small, fast, monkeypatch):
    monkeypatch.setattr(activations, "bf16_is_fast", lambda: fast)
    model, tokenizer = small
    exact = extract_activations(model, tokenizer, PROMPTS, half=False).values
    half = extract_activations(model, tokenizer, PROMPTS, half=True).values
    assert half.dtype == np.float32
    assert 1e-5 < np.abs(half - exact)[:, 1:].max() < 0.05 * np.abs(exact).max()
    np.testing.assert_array_equal(extract_activations(model, tokenizer, PROMPTS).values, half if fast else exact)


def test_a_model_in_bfloat16_gives_float32(small):
    model, tokenizer = small
    exact = extract_activations(model, tokenizer, PROMPTS, half=False).values
    got = extract_activations(model.to(torch.bfloat16), tokenizer, PROMPTS, position="last", half=False).values
    assert got.dtype == np.float32 and np.abs(got - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_as_it_was(small, training, fails):
    model, tokenizer = small
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids, output_hidden_states=True)
    attached = hooks(model)
    model.train(training)
    if fails:
        handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract_activations(model, tokenizer, PROMPTS)
        handle.remove()
    else:
        extract_activations(model, tokenizer, PROMPTS, layers=[2])
    assert hooks(model) == attached
    assert all(module.training is training for module in model.modules())
    after = model.eval()(ids, output_hidden_states=True)
    assert torch.is_grad_enabled() and after.logits.requires_grad and len(after.hidden_states) == 5
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=0)
    assert not torch.is_autocast_enabled("cpu")


def test_dropout_is_off(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama3", attention_dropout=0.5), tiny_tokenizer("llama3")
    expected = extract_activations(model, tokenizer, PROMPTS, half=False).values
    np.testing.assert_array_equal(extract_activations(model.train(), tokenizer, PROMPTS, half=False).values, expected)


@pytest.mark.parametrize("layers", [[5], [-1], [0, 99], []])
def test_unknown_layers(small, layers):
    with pytest.raises(ValueError, match=r"this model has 0 \(embeddings\) to 4"):
        extract_activations(*small, PROMPTS, layers=layers)


def test_other_wrong_arguments(small):
    with pytest.raises(ValueError, match="'first': expected one of last, mean, all"):
        extract_activations(*small, PROMPTS, position="first")
    with pytest.raises(ValueError, match="no prompts"):
        extract_activations(*small, [])
    with pytest.raises(ValueError, match="7 prompts but 1 responses"):
        extract_activations(*small, PROMPTS, ["one"])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        extract_activations(*small, ["a", " "])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(small, value):
    model, tokenizer = small
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = value
    assert np.isfinite(extract_activations(model, tokenizer, PROMPTS, layers=[1], half=False).values).all()
    with pytest.raises(ValueError, match="not finite.*float32 or bfloat16"):
        extract_activations(model, tokenizer, PROMPTS, half=False)


def test_a_text_longer_than_the_context_is_refused_and_a_response_cut_to_fit(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama3", max_position_embeddings=64), tiny_tokenizer("llama3")
    with pytest.raises(ValueError, match="prompt 1 has .* tokens, but the limit is 64"):
        extract_activations(model, tokenizer, ["Hi", PROMPTS[0]])
    with pytest.raises(ValueError, match="prompt 0 has .* leaves no room for a response within 64"):
        extract_activations(model, tokenizer, [PROMPTS[0]], ["Hi"])
    long = extract_activations(model, tokenizer, ["Hi"], [PROMPTS[0]], position="all")
    prompt = len(render_prompts(tokenizer, ["Hi"])[0])
    assert len(long.tokens(0)) == 64 - prompt


@pytest.mark.parametrize(
    "texts, starts, shared",
    [
        ([[1, 2, 3, 4], [1, 2, 5]], [0, 0], 2),
        ([[1, 2, 3], [1, 2]], [0, 0], 1),  # each keeps a token of its own
        ([[1, 2], [1, 2]], [0, 0], 1),
        ([[7]], [0], 0),
        ([[1, 2], [3, 4]], [0, 0], 0),
        ([[1, 2, 3, 4], [1, 2, 3, 5]], [2, 3], 2),  # a response keeps all of its tokens
    ],
)
def test_what_all_texts_begin_with(texts, starts, shared):
    assert activations.shared_beginning(texts, starts) == shared


@pytest.mark.parametrize("position", ["last", "mean", "all"])
def test_texts_that_share_much_give_what_each_gives_alone(family, position):
    model, tokenizer = family
    prompts = [PROMPTS[0] + end for end in ("", "a", "b " * 30)] * 2  # the shared part exceeds Gemma's window
    got = extract_activations(model, tokenizer, prompts, position=position, half=False)
    alone = [extract_activations(model, tokenizer, [p], position=position, half=False).values for p in prompts]
    np.testing.assert_allclose(got.values, np.concatenate(alone), rtol=0, atol=1e-4)
    ids = render_prompts(tokenizer, prompts)
    if position != "all":
        np.testing.assert_allclose(got.values, [pooled(block_outputs(model, i), position) for i in ids], rtol=0, atol=1e-4)


def test_no_batch_exceeds_its_budget_and_no_text_is_lost():
    lengths = [5, 300, 7, 7, 64, 20, 1, 33]
    batches = list(activations._batches(lengths, 100))
    assert sorted(sum(batches, [])) == list(range(8))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in batches)
    assert [1] in batches, "a text above the budget gets a batch of its own"


def test_layers_side_by_side_and_pooled(small):
    states = extract_activations(*small, PROMPTS, layers=[1, 3])
    np.testing.assert_array_equal(states.concatenated(), np.hstack([states.layer(1), states.layer(3)]))
    np.testing.assert_allclose(states.pooled(), (states.layer(1) + states.layer(3)) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="kept at position \"all\", not at 'last'"):
        states.tokens(0)


# ----------------------------------------------------------------------------------------------- identity


def test_a_fingerprint_follows_the_weights_and_not_the_name(tiny_model, tiny_tokenizer, saved_model):
    from safelab.models import load_model

    model = tiny_model("llama3")
    first = model_fingerprint(model)
    assert model_fingerprint(tiny_model("llama3")) == first != model_fingerprint(tiny_model("llama3", seed=1))
    assert model_fingerprint(load_model(saved_model("llama3"), device="cpu")[0]) == first
    assert model_fingerprint(tiny_model("llama3", rope_parameters={"rope_type": "default", "rope_theta": 5e5})) != first
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] += 1e-3
    assert model_fingerprint(model) != first
    assert len({template_fingerprint(tiny_tokenizer(name)) for name in FAMILIES}) == len(FAMILIES)


def test_a_fingerprint_knows_which_adapter_is_on(tiny_model, random_lora):
    plain = model_fingerprint(tiny_model("llama3"))
    tuned = random_lora(tiny_model("llama3"))
    on = model_fingerprint(tuned)
    with tuned.disable_adapter():
        assert model_fingerprint(tuned) == plain
    other = model_fingerprint(random_lora(tiny_model("llama3"), seed=1))
    louder = model_fingerprint(random_lora(tiny_model("llama3"), lora_alpha=16))
    assert len({plain, on, other, louder}) == 4 and model_fingerprint(tuned) == on


# ---------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "activations"


@pytest.mark.parametrize("position", ["last", "mean", "all"])
def test_a_cached_result_is_the_same_and_computed_once(small, home, position, monkeypatch):
    model, tokenizer = small
    plain = extract_activations(model, tokenizer, PROMPTS, position=position, layers=[1, 4])
    first = extract_activations(model, tokenizer, PROMPTS, position=position, layers=[1, 4], cache=True)
    (file,) = home.iterdir()
    assert file.suffix == ".safetensors"
    monkeypatch.setattr(activations, "_read", lambda *_: pytest.fail("computed again"))
    again = extract_activations(model, tokenizer, PROMPTS, position=position, layers=[1, 4], cache=True)
    for got in (first, again):
        np.testing.assert_array_equal(got.values, plain.values)
        assert got.layers == plain.layers and got.position == position
        assert not got.values.flags.writeable and not got.values.flags.owndata, "mapped, not copied"
    if position == "all":
        np.testing.assert_array_equal(again.offsets, plain.offsets)


def test_what_changes_the_result_changes_the_file(tiny_model, tiny_tokenizer, random_lora, home):
    model, tokenizer = tiny_model("llama3"), tiny_tokenizer("llama3")
    tuned = random_lora(tiny_model("llama3"))
    short = tiny_tokenizer("llama3")
    short.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}:"
    calls = [
        lambda **k: extract_activations(model, tokenizer, PROMPTS, layers=[2], **k),  # before all layers, among which they would be found
        lambda **k: extract_activations(model, tokenizer, PROMPTS, **k),
        lambda **k: extract_activations(tiny_model("llama3", seed=1), tokenizer, PROMPTS, **k),
        lambda **k: extract_activations(tuned, tokenizer, PROMPTS, **k),
        lambda **k: extract_activations(model, short, PROMPTS, **k),
        lambda **k: extract_activations(model, tokenizer, PROMPTS[::-1], **k),
        lambda **k: extract_activations(model, tokenizer, PROMPTS, RESPONSES, **k),
        lambda **k: extract_activations(model, tokenizer, PROMPTS, position="mean", **k),
        lambda **k: extract_activations(model, tokenizer, PROMPTS, half=not bf16_is_fast(), **k),
    ]
    for number, call in enumerate(calls, 1):
        np.testing.assert_array_equal(call(cache=True).values, call().values)
        assert len(list(home.iterdir())) == number
    with tuned.disable_adapter():  # the model inside, which is cached already
        extract_activations(tuned, tokenizer, PROMPTS, cache=True)
    assert len(list(home.iterdir())) == len(calls)


def test_weights_that_are_cast_once_give_the_same_states(small, monkeypatch):
    model, tokenizer = small
    model.requires_grad_(False)
    once = extract_activations(model, tokenizer, PROMPTS, half=True)
    seen = []
    monkeypatch.setattr(activations, "frozen_in_half", lambda *models: seen.append(models) or contextlib.nullcontext())
    np.testing.assert_array_equal(extract_activations(model, tokenizer, PROMPTS, half=True).values, once.values)
    extract_activations(model, tokenizer, PROMPTS, half=False)
    assert seen == [(model,)]


def test_some_layers_are_read_from_where_all_were_kept(small, home, monkeypatch):
    model, tokenizer = small
    plain = extract_activations(model, tokenizer, PROMPTS, layers=[1, 4])
    extract_activations(model, tokenizer, PROMPTS, cache=True)
    monkeypatch.setattr(activations, "_read", lambda *_: pytest.fail("computed again"))
    found = extract_activations(model, tokenizer, PROMPTS, layers=[4, 1], cache=True)
    np.testing.assert_array_equal(found.values, plain.values)
    assert found.layers == (1, 4) and len(list(home.iterdir())) == 1


def test_a_broken_file_is_made_again_and_a_foreign_one_refused(small, home):
    model, tokenizer = small
    expected = extract_activations(model, tokenizer, PROMPTS, layers=[1], cache=True).values.copy()
    extract_activations(model, tokenizer, PROMPTS, layers=[2], cache=True)
    by_layer = {json.loads(activations.safe_open(f, "pt").metadata()["about"])["layers"][0]: f for f in home.iterdir()}
    for content in (by_layer[1].read_bytes()[:-4], by_layer[1].read_bytes()[:40], b""):
        by_layer[1].unlink()
        by_layer[1].write_bytes(content)
        np.testing.assert_array_equal(extract_activations(model, tokenizer, PROMPTS, layers=[1], cache=True).values, expected)
    other = by_layer[2].read_bytes()
    by_layer[1].unlink()
    by_layer[1].write_bytes(other)
    with pytest.raises(ValueError, match=r"holds the values of something else \(differing: layers\).*delete it"):
        extract_activations(model, tokenizer, PROMPTS, layers=[1], cache=True)
    assert by_layer[1].read_bytes() == other


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_found_out_before_anything_is_mapped():
    with pytest.raises(SourceError, match="disk is full: cannot store activations"):
        activations._create(Path("/dev/full"), {}, (1000, 10))


def test_a_mapped_file_has_no_holes(tmp_path):
    activations._create(tmp_path / "a.safetensors", {}, (1000, 100))
    assert 512 * (tmp_path / "a.safetensors").stat().st_blocks >= 4 * 1000 * 100


def test_nothing_is_cached_on_an_error(small, home):
    model, tokenizer = small
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        extract_activations(model, tokenizer, PROMPTS, cache=True, batch_tokens=64)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        extract_activations(model, tokenizer, ["a", ""], layers=[1], cache=True)
    with pytest.raises(ValueError, match="this model has 0"):
        extract_activations(model, tokenizer, PROMPTS, layers=[9], cache=True)
    assert not home.exists() or not list(home.iterdir())


def test_a_layer_that_was_not_extracted():
    activations = Activations(np.zeros((2, 2, 3), dtype=np.float32), (1, 4), "last")
    assert activations.layer(4).shape == (2, 3)
    with pytest.raises(ValueError, match="layer 2 was not extracted; there are 1, 4"):
        activations.layer(2)
