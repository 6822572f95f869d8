"""Tiny random models of each family, with weights large enough that every mistake in a mask or a position shows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lit_align.batch import CompletionBatch

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
OTHER: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": GROUPED | {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "phi3": GROUPED | {"sliding_window": 5},
    "mistral": GROUPED | {"sliding_window": 5, "head_dim": 8},
    "gemma2": GROUPED
    | {"sliding_window": 5, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 4.0},
    "gemma": GROUPED | {"head_dim": 8},
    "granite": GROUPED | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": GROUPED | {"logit_scale": 0.3},
    "olmo2": GROUPED,
}
FAMILIES = sorted(OTHER)


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a family, every parameter drawn from N(0, 0.3) except norms near 1."""
    config = AutoConfig.for_model(family, **(SIZES | OTHER[family] | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name or "ln_" in name else 0.0, 0.3)
    return model.eval()


def save_tiny(family: str, folder: Any, seed: int = 0, **changes: Any) -> str:
    """A tiny model on disk, as a user would have it."""
    tiny(family, seed, **changes).save_pretrained(folder)
    return str(folder)


def ragged_batch(seed: int = 0, vocabulary: int = VOCABULARY) -> CompletionBatch:
    """Four groups of unequal prompts, unequal completions and an absent column; longer than the tests' windows."""
    generator = torch.Generator().manual_seed(seed)
    prompts, lengths = [7, 3, 11, 5], [[6, 9, 4], [12, 1, 3], [2, 8, 0], [5, 5, 7]]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(3, vocabulary, shape, generator=generator)

    prompt_mask = torch.arange(12)[None] < torch.tensor(prompts)[:, None]
    completion_mask = torch.arange(13) < torch.tensor(lengths)[..., None]
    return CompletionBatch(
        prompt_ids=draw(4, 12) * prompt_mask,
        prompt_mask=prompt_mask,
        completion_ids=draw(4, 3, 13) * completion_mask,
        completion_mask=completion_mask,
        reward=None,
        present=torch.tensor(lengths) > 0,
        row=torch.arange(4),
    )
