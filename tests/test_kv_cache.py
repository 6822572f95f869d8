"""The cache of keys and values against transformers' own, and the memory it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.cache_utils import DynamicCache

from lit_align import kv_cache
from lit_align.batch import Sampling
from lit_align.kv_cache import Growing, growing_cache, rows_at_once, token_bytes
from lit_align.pair import PolicyReferencePair
from lit_align.settings import PairSettings
from tests.families import FAMILIES, GROUPED, SIZES, ragged_batch, save_tiny, tiny


@pytest.mark.parametrize("window", [None, 6])
def test_growing_buffers_give_what_the_librarys_cache_gives(window: int | None, monkeypatch: Any) -> None:
    """The same keys, values and mask sizes over growths, copies and rows that leave or change their place."""
    monkeypatch.setattr("lit_align.kv_cache.ROOM", 3)
    config = AutoConfig.for_model("mistral", **(SIZES | GROUPED | {"sliding_window": window}))
    own: Any = DynamicCache(config=config)
    ours = growing_cache(config)
    assert all(isinstance(layer, Growing) for layer in ours.layers)
    assert ours.is_sliding == own.is_sliding
    generator = torch.Generator().manual_seed(0)
    rows = 3
    changes = {0: [0, 0, 1, 1, 2, 2], 2: [5, 1, 4, 3], 5: [2, 1, 0], 9: [0, 2]}
    for step in range(14):
        length = 4 if step == 0 else 1
        assert ours.get_mask_sizes(length, 0) == own.get_mask_sizes(length, 0)
        keys, values = torch.randn(2, rows, 2, length, 8, generator=generator)
        values = values[..., :5]  # some families' values are narrower
        for found, expected in zip(ours.update(keys, values, 0), own.update(keys, values, 0), strict=True):
            assert torch.equal(found, expected)
        assert ours.get_seq_length() == own.get_seq_length()
        if step in changes:
            index = torch.tensor(changes[step])
            ours.reorder_cache(index)
            own.reorder_cache(index)
            rows = len(index)


def test_a_step_copies_no_key_and_a_row_that_stays_is_not_moved() -> None:
    layer = growing_cache(tiny("llama").config).layers[0]
    layer.update(torch.ones(4, 2, 5, 8), torch.ones(4, 2, 5, 8))
    place = layer.keys.data_ptr()
    layer.update(torch.ones(4, 2, 1, 8), torch.ones(4, 2, 1, 8))
    layer.reorder_cache(torch.tensor([0, 3]))
    seen, _ = layer.update(torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8))
    assert layer.keys.data_ptr() == seen.data_ptr() == place


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_takes_what_the_librarys_cache_holds_of_it(family: str, dtype: torch.dtype) -> None:
    model: Any = tiny(family)
    model.to(dtype)
    cache: Any = DynamicCache()  # no layer of which forgets
    with torch.no_grad():
        model(torch.ones(2, 7, dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert token_bytes(model.config, dtype) == held / (2 * 7)


def test_a_model_of_eight_billion_weights_on_a_small_gpu() -> None:
    """Llama 3's 8B: 32 layers, 8 groups of heads, 128 numbers, keys and values, 2 bytes each: 128 KiB a token."""
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    assert token_bytes(AutoConfig.for_model("llama", **sizes), torch.bfloat16) == 128 * 2**10


@pytest.mark.parametrize(("rows", "expected"), [(0, 1), (0.9, 1), (1, 1), (5, 5), (5.9, 5), (10**6, kv_cache.ROWS)])
def test_as_many_rows_as_an_eighth_of_the_memory_holds(
    rows: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    one = token_bytes(model.config, torch.float32) * (100 + kv_cache.ROOM)
    monkeypatch.setattr(kv_cache, "memory", lambda device: int(8 * rows * one))
    assert rows_at_once(model, 100) == expected


def test_a_draw_keeps_to_its_memory_and_is_the_same_in_less(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is measured as it grows: with room for three rows no more than three are there at once."""
    pair = PolicyReferencePair(PairSettings(save_tiny("llama", tmp_path_factory.mktemp("tiny"))))
    prompts, sampling = ragged_batch(), Sampling(9, seed=4)
    whole = pair.generate(prompts, 5, sampling).completions
    # The longest prompt has 11 tokens.
    room = 3 * token_bytes(pair.base.config, torch.float32) * (11 + 9 + kv_cache.ROOM)
    monkeypatch.setattr(kv_cache, "memory", lambda device: 8 * room)
    most, update = 0, Growing.update

    def watched(layer: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal most
        found = update(layer, *args, **kwargs)
        most = max(most, layer.keys.nbytes + layer.values.nbytes)
        return found

    monkeypatch.setattr(Growing, "update", watched)
    less = pair.generate(prompts, 5, sampling).completions
    assert 0 < most * SIZES["num_hidden_layers"] <= room
    assert torch.equal(less.completion_ids, whole.completion_ids)
