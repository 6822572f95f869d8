"""Models of random weights, made on the spot: time and memory depend on the shapes alone."""

from __future__ import annotations

from pathlib import Path

import torch

SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    },
    "25M": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    },
    "25M, 150k words": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 150_000,
    },
    "85M": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}
"""Name -> what the Llama config of that shape sets; "25M" are its parameters with input and output embedding shared."""


def make(shape: str, folder: Path) -> str:
    """Write a Llama of random weights, once; its folder.

    Args:
        shape: A key of ``SHAPES``.
        folder: Where models are kept during a run.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / shape.replace(", ", "-").replace(" ", "-")
    if not path.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            **SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=2, bos_token_id=1
        )
        LlamaForCausalLM(config).save_pretrained(path)
    return str(path)
