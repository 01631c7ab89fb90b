"""What a frozen model makes of a response: its states while reading it, and how much the prompt explains it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from safelab.evaluation import autocast
from safelab.models import eval_mode, pad_left, render_pairs, render_prompts

PROMPT_CHARACTERS, RESPONSE_CHARACTERS = 1200, 1000
"""The end of a prompt and the beginning of a response that are read; the rest seldom changes a verdict, and costs time."""
OPENING = 16
"""Response tokens over which the prompt's help is measured: an answer shows there what it is an answer to."""
NEUTRAL = "Please go on."


@dataclass(frozen=True)
class Reading:
    """Of n examples: mean states over the response ``(n, layers, width)``, and the prompt's help ``(n,)`` in nats a token.

    The help is ``log p(opening | prompt) - log p(opening | a neutral prompt)``, the mean over the opening's tokens:
    near zero or below where the response has nothing to do with the prompt (Church and Hanks 1990 for words).
    """

    states: np.ndarray
    help: np.ndarray


@torch.no_grad()
def read(model, tokenizer, prompts: list[str], responses: list[str], layers: list[int], *, batch_size: int = 16, progress: str | None = None) -> Reading:
    """Read each response twice: whole after its prompt, and its opening after a neutral one.

    ``layers`` are numbers of transformer blocks, 1 to all but the last (whose output comes normalised).
    """
    prompts = [p.strip()[-PROMPT_CHARACTERS:].strip() for p in prompts]
    responses = [r.strip()[:RESPONSE_CHARACTERS].strip() for r in responses]
    pairs = render_pairs(tokenizer, prompts, responses)
    start = len(render_prompts(tokenizer, [NEUTRAL])[0])
    alone = render_pairs(tokenizer, [NEUTRAL] * len(responses), responses, max_length=start + OPENING)
    states = np.empty((len(pairs), len(layers), model.config.hidden_size), dtype=np.float32)
    gain = np.empty(len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].input_ids))
    with eval_mode(model), autocast(model), tqdm(total=len(pairs), desc=progress, disable=progress is None, unit="example", leave=False) as bar:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            hidden, with_prompt = _pass(model, tokenizer, [pairs[i] for i in rows], layers)
            _, without = _pass(model, tokenizer, [alone[i] for i in rows], [])
            states[rows] = hidden
            gain[rows] = [_mean_gain(a, b) for a, b in zip(with_prompt, without)]
            bar.update(len(rows))
    return Reading(states, gain)


def _mean_gain(with_prompt: np.ndarray, without: np.ndarray) -> float:
    n = min(len(with_prompt), len(without))  # the same tokens on both sides
    return float((with_prompt[:n] - without[:n]).mean())


def _pass(model, tokenizer, pairs, layers: list[int]):
    """Mean states over the response ``(batch, layers, width)``, and each opening's token log-probabilities."""
    ids, mask = pad_left([p.input_ids for p in pairs], tokenizer.pad_token_id)
    ids, mask = ids.to(model.device), mask.to(model.device)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    out = base.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=bool(layers))
    starts = [ids.shape[1] - len(p.input_ids) + p.prompt_length for p in pairs]
    logs = []
    for row, begin in enumerate(starts):
        opening = ids[row, begin : begin + OPENING]
        logits = base.get_output_embeddings()(out.last_hidden_state[row, begin - 1 : begin - 1 + len(opening)])
        logs.append(logits.float().log_softmax(-1).gather(1, opening[:, None])[:, 0].cpu().numpy())
    means = [torch.stack([out.hidden_states[layer][row, begin:].float().mean(0) for layer in layers]) for row, begin in enumerate(starts)] if layers else []
    return torch.stack(means).cpu().numpy() if layers else None, logs
