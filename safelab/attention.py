"""Attention for training on a CPU: PyTorch's own forward pass, and for short texts a quicker backward pass.

PyTorch's fused attention keeps no probabilities and makes them anew, block by block, in its backward pass. Under 192 tokens
its blocks on a CPU are small, and that pass alone is a fifth of a training step. Making them anew for the whole text at
once takes less time and as little memory; the forward pass is untouched, to the bit (``benchmarks/README.md``).
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "sdpa-short"
"""Of this attention among those of transformers."""
SHORT = 256
"""Tokens from which on PyTorch's own backward pass is used."""


class ShortAttention(torch.autograd.Function):
    """``softmax(scale * query key' + mask) value`` for ``(batch, heads, length, width)``; ``mask`` is None for a causal one.

    With probabilities P and an output's gradient G: dV = P'G, dS = P * (GV' - rowsum(P * GV')), dQ = scale dS K,
    dK = scale dS' Q (Dao et al. 2022, arXiv 2205.14135, appendix B).
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, mask = ctx.saved_tensors
        exact = torch.promote_types(query.dtype, torch.float32)
        scores = query @ key.transpose(-1, -2)
        p = torch.softmax(torch.add(_bias(mask, scores.shape[-1], exact), scores, alpha=ctx.scale), -1)
        dp = (grad @ value.transpose(-1, -2)).to(exact)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, exact).mul_(ctx.scale).to(query.dtype)
        return ds @ key, ds.transpose(-1, -2) @ query, p.to(query.dtype).transpose(-1, -2) @ grad, None, None


def _bias(mask: torch.Tensor | None, length: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores: the lowest number where a key is not seen (a row that sees none has no gradient to give)."""
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def short_attention(module, query, key, value, attention_mask, dropout: float = 0.0, scaling: float | None = None, **kwargs):
    """As transformers asks of an attention function; whatever is not a short text in training goes to its own for ``"sdpa"``."""
    length = query.shape[2]
    ours = (
        torch.is_grad_enabled() and query.device.type == "cpu" and not dropout and length == key.shape[2] < SHORT
        and kwargs.get("position_bias") is None and kwargs.get("softcap") is None and kwargs.get("cache") is None
        and (attention_mask is not None or (kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)))
    )  # fmt: skip
    if not ours:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = (x.to(dtype) for x in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ShortAttention.apply(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, short_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def quick_attention(model):
    """Inside, a transformers model on a CPU that uses PyTorch's attention uses this one; ``model`` may have an adapter."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.device.type != "cpu" or base.config._attn_implementation != "sdpa":
        yield
        return
    base.set_attn_implementation(NAME)
    try:
        yield
    finally:
        base.set_attn_implementation("sdpa")
