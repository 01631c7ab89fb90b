"""Attention with a quicker backward pass: the same forward pass to the bit, and the gradient of the definition."""

import math

import pytest
import torch
import torch.nn.functional as F

from safelab import attention
from safelab.attention import NAME, SHORT, ShortAttention, quick_attention, short_attention


def definition(query, key, value, seen, scale):
    """Softmax attention as it is written down, one query at a time."""
    rows = []
    for t in range(query.shape[2]):
        scores = scale * (query[:, :, t : t + 1] * key).sum(-1)
        p = torch.softmax(scores.masked_fill(~seen[:, :, t], -math.inf), -1)
        rows.append((p[..., None] * value).sum(2))
    return torch.stack(rows, 2)


def inputs(dtype=torch.float64, batch=3, heads=2, length=11, width=4):
    torch.manual_seed(0)
    return [torch.randn(batch, heads, length, width, dtype=dtype).requires_grad_() for _ in range(3)]


CAUSAL = torch.ones(11, 11, dtype=torch.bool).tril()
MASKS = {
    "causal": None,
    "padded on the right": CAUSAL & (torch.arange(11) < torch.tensor([11, 7, 3])[:, None])[:, None, None],
    "a window": (CAUSAL & ~torch.ones(11, 11, dtype=torch.bool).tril(-4))[None, None].expand(3, 1, 11, 11),
}


@pytest.mark.parametrize("mask", MASKS)
def test_output_and_gradients_are_those_of_the_definition(mask):
    query, key, value = inputs()
    seen = (CAUSAL[None, None] if MASKS[mask] is None else MASKS[mask]).expand(3, 1, 11, 11)
    gradient = torch.randn_like(query)
    expected = definition(query, key, value, seen, 0.3)
    ours = ShortAttention.apply(query, key, value, MASKS[mask], 0.3)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(torch.autograd.grad(ours, (query, key, value), gradient), torch.autograd.grad(expected, (query, key, value), gradient)):
        torch.testing.assert_close(a, b)


def test_a_mask_of_numbers_is_added():
    query, key, value = inputs()
    numbers = torch.zeros(3, 1, 11, 11, dtype=torch.float64).masked_fill_(~CAUSAL, -math.inf)
    for a, b in zip(*(torch.autograd.grad(ShortAttention.apply(query, key, value, m, 0.3).square().sum(), (query, key, value)) for m in (None, numbers))):
        torch.testing.assert_close(a, b)


def test_a_row_that_sees_nothing_gives_no_gradient_where_it_gets_none():
    """The padding of a batch that is padded on the left."""
    query, key, value = inputs()
    mask = CAUSAL & (torch.arange(11) >= torch.tensor([0, 4, 8])[:, None])[:, None, None]
    gradient = torch.randn_like(query) * mask.any(-1)[..., None]
    for g in torch.autograd.grad(ShortAttention.apply(query, key, value, mask, 0.3), (query, key, value), gradient):
        assert g.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_gradients_are_as_near_to_double_precision_as_pytorchs_own(dtype):
    exact = inputs()
    half = [x.detach().to(dtype).requires_grad_() for x in exact]
    gradient = torch.randn(3, 2, 11, 4, dtype=torch.float64)
    seen = CAUSAL[None, None].expand(3, 1, 11, 11)
    expected = torch.autograd.grad(definition(*exact, seen, 0.5), exact, gradient)

    def error(output):
        return [(g.double() - e).norm() / e.norm() for g, e in zip(torch.autograd.grad(output, half, gradient.to(dtype)), expected)]

    theirs = error(F.scaled_dot_product_attention(*half, is_causal=True, scale=0.5))
    assert all(ours <= 1.3 * their + 1e-3 for ours, their in zip(error(ShortAttention.apply(*half, None, 0.5)), theirs))


@pytest.mark.parametrize("autocast", [False, True])
def test_in_a_model_the_forward_pass_is_pytorchs_to_the_bit_and_the_gradient_its_own(family, autocast):
    model, tokenizer = family
    batch = tokenizer(["How do I bake bread at home?", "Tell me about the history of the city, its rivers and its bridges."], padding=True, return_tensors="pt")
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}

    def run():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(**batch, use_cache=False).logits
        (logits.float() * batch["attention_mask"][..., None]).square().mean().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert model.config._attn_implementation == "sdpa"
    logits, gradient = run()
    with quick_attention(model):
        assert model.config._attn_implementation == NAME
        our_logits, our_gradient = run()
    assert model.config._attn_implementation == "sdpa" and torch.equal(logits, our_logits)
    assert not torch.equal(gradient, our_gradient) or not autocast  # another way of rounding: it was ours that ran
    assert (gradient - our_gradient).norm() <= (0.03 if autocast else 1e-5) * gradient.norm()


def test_what_is_not_a_short_text_in_training_goes_to_transformers_own(monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **kwargs: calls.append(kwargs) or ("theirs", None))
    module = torch.nn.Module()
    short = inputs(torch.float32)
    long = inputs(torch.float32, batch=1, heads=1, length=SHORT)
    short_attention(module, *short, None)
    assert not calls
    with torch.no_grad():
        short_attention(module, *short, None)
    short_attention(module, *long, None)
    short_attention(module, *short, None, dropout=0.1)
    short_attention(module, short[0][:, :, -1:], *short[1:], None)  # one token after a cache
    short_attention(module, *short, None, is_causal=False)
    short_attention(module, *short, None, position_bias=torch.zeros(1))
    short_attention(module, *short, None, softcap=30.0)
    assert len(calls) == 7 and calls[2]["dropout"] == 0.1 and calls[-1]["softcap"] == 30.0


def test_another_attention_is_left_alone_and_ours_goes_when_training_breaks_off(tiny_model):
    model = tiny_model("llama3")
    model.set_attn_implementation("eager")
    with quick_attention(model):
        assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    with pytest.raises(KeyboardInterrupt), quick_attention(model):
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"
