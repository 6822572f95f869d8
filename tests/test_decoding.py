"""Rows read token by token against rows read whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_align.decoding import decoding, has_cache
from tests.families import GROUPED, SIZES, tiny

OTHERS: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "gemma3_text": GROUPED
    | {"sliding_window": 5, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt_oss": GROUPED | {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16},
    "jamba": GROUPED | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "rwkv": {"attention_hidden_size": 32},
}
"""Families outside the scorer's shared rows: other positions, caches of several kinds, recurrent states, no cache."""


def other(family: str) -> Any:
    config = AutoConfig.for_model(family, **(SIZES | OTHERS[family]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


@pytest.mark.parametrize("family", [*OTHERS, "llama", "gemma2", "mistral", "gpt2"])
def test_rows_read_token_by_token_are_the_models_own(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ragged prompts, unequal copies, rows that leave: each hidden state is that of the unpadded row read whole."""
    monkeypatch.setattr("lit_align.kv_cache.ROOM", 2)
    model = other(family) if family in OTHERS else tiny(family)
    cached = has_cache(model)
    assert cached == (family != "rwkv")
    assert ("rwkv" in caplog.text) == (not cached)
    generator = torch.Generator().manual_seed(1)
    lengths = [7, 2, 11]
    mask = torch.arange(13) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 61, (3, 13), generator=generator) * mask
    texts = [ids[i, : lengths[i]] for i in (0, 0, 1, 2, 2)]
    rows = decoding(model, cached)
    with torch.no_grad():
        hidden = rows.begin(ids, mask, torch.tensor([0, 0, 1, 2, 2]))
        for step in range(9):
            for found, text in zip(hidden, texts, strict=True):
                expected = model.base_model(input_ids=text[None]).last_hidden_state[0, -1]
                torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)
            if step in {2, 5}:
                index = [0, 4, 2] if step == 2 else [2, 1]
                rows.keep(torch.tensor(index))
                texts = [texts[i] for i in index]
            tokens = torch.randint(3, 61, (len(texts),), generator=generator)
            texts = [torch.cat([text, token[None]]) for text, token in zip(texts, tokens, strict=True)]
            hidden = rows.step(tokens)
