"""Antidote: after fine-tuning, the adapter's weights that harmful prompts use most are set to zero."""

from __future__ import annotations

import math

import torch

from safelab.defenses.alignment_data import harmful_pairs
from safelab.defenses.base import Defense
from safelab.defenses.defaults import default
from safelab.models import eval_mode


class Antidote(Defense):
    """In every linear map W of the adapter (A and B alike) the ``ratio`` of largest scores of each output row become zero::

        score_ij = |W_ij| * sqrt(mean ||x_j||^2)

    with x_j the j-th input of W over the tokens of harmful examples (Wanda's score, Sun et al. 2023, used the other way
    round). It needs harmful pairs (:func:`safelab.defenses.alignment_data.harmful_pairs`, of the ``probe`` split: none of
    the attacker's).

    Source: Huang et al. 2024, "Antidote: post-fine-tuning safety alignment" (arXiv 2408.09600), and the authors' code.
    """

    name = "antidote"

    def __init__(self, ratio: float = default("antidote", "ratio"), examples: int = default("antidote", "examples")) -> None:
        self.ratio, self.examples = ratio, examples

    def after(self, model, tokenizer):
        from safelab.training import PairCollator, tokenize_pairs

        rows = tokenize_pairs(tokenizer, harmful_pairs(self.examples))
        prune_adapter(model, rows, PairCollator(tokenizer.pad_token_id), self.ratio)
        return model


@torch.no_grad()
def prune_adapter(model, rows, collate, ratio: float, *, batch_size: int = 16) -> None:
    """Zero the ``ratio`` of largest scores (rounded up) in each output row of the adapter's linear maps, in place."""
    linears = {name: m for name, m in model.named_modules() if "lora_" in name and isinstance(m, torch.nn.Linear)}
    squares = {name: torch.zeros(m.in_features, dtype=torch.float64) for name, m in linears.items()}
    token_mask = torch.empty(0)

    def add(name: str):
        def hook(module, args):
            x = args[0][token_mask].double()  # padding counts for nothing
            squares[name] += x.square().sum(0).cpu()

        return hook

    handles = [m.register_forward_pre_hook(add(name)) for name, m in linears.items()]
    try:
        with eval_mode(model):
            for start in range(0, len(rows), batch_size):
                batch = collate(list(rows.select(range(start, min(start + batch_size, len(rows))))))
                ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
                token_mask = mask.bool()
                model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    for name, m in linears.items():  # a mean would divide all inputs of a row by the same number
        score = m.weight.abs().double() * squares[name].sqrt().to(m.weight.device)
        top = score.topk(math.ceil(round(ratio * m.in_features, 6)), dim=1).indices
        m.weight.scatter_(1, top, 0.0)
