"""A folder with a model of Llama 3.2 1B's shape and random weights, to measure what training steps cost on a GPU.

    python benchmarks/llama_1b_shape.py DIR && safelab bench --model DIR --steps 20

Speed and memory depend on the shape alone, so no weights need be fetched. The tokenizer is the embedded model's.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from safelab.models import _converted_embedded


def main(folder: str) -> None:
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        tie_word_embeddings=True, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.cpu().save_pretrained(folder)
    AutoTokenizer.from_pretrained(_converted_embedded()).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
