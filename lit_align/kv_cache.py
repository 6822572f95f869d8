"""The cache of keys and values: how many completions have room for theirs, and one that grows in place."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

ROWS = 128
"""Most completions that grow at once. On the model that comes along 128 give a quarter more tokens a second than 64,
since a batch of which most have ended is read at a poor rate."""

SHARE = 8
"""Their keys and values may take an eighth of the device's memory; the base and the adapter need theirs beside it."""

UNKNOWN = 2**33
"""Memory of a machine that does not tell."""

ROOM = 64
"""Tokens a cache has room for beyond those it holds, whenever it grows: between two growths nothing is copied."""


def rows_at_once(model: Any, tokens: int) -> int:
    """How many completions may grow at once: as many as have room, and at most ``ROWS``.

    It depends on what the device has and not on what is free there now, so that the same command draws the same.

    Args:
        model: A causal language model.
        tokens: Tokens of the longest row, its prompt included.

    Returns:
        Rows, >= 1.
    """
    room = memory(model.device) // SHARE
    return max(1, min(ROWS, room // (token_bytes(model.config, model.dtype) * (tokens + ROOM))))


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers; for a model without attention what that would take."""
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * groups * size * dtype.itemsize


def memory(device: torch.device) -> int:
    """Bytes of a device's memory, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else UNKNOWN


class Growing:
    """Keys and values of one layer in buffers with room to spare: a step writes its own and copies no other.

    Rows that have left stay behind the others in the buffers until these grow. Mixed into a layer of transformers'
    cache by ``growing_cache``, whose interface it has.

    Args:
        window: Sliding window of the layer's attention, which then sees the last ``window`` tokens; None for all.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.count = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of N tokens, (R, heads, N, size); return those that the N tokens may see."""
        self.keys = _written(self.keys, key_states, self.count)
        self.values = _written(self.values, value_states, self.count)
        first, rows = self._first(), len(key_states)
        self.count += key_states.shape[-2]
        self.is_initialized = True
        return self.keys[:rows, :, first : self.count], self.values[:rows, :, first : self.count]

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens ``query_length`` new ones will see, and the place of the first."""
        return self.count + query_length - self._first(), self._first()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on as row ``beam_idx[i]`` was; only rows that change their place are copied."""
        if self.keys is not None and self.values is not None:
            self.keys = _reordered(self.keys, beam_idx, self.count)
            self.values = _reordered(self.values, beam_idx, self.count)

    def _first(self) -> int:
        return 0 if self.window is None else max(0, self.count - self.window + 1)


def growing_cache(config: Any) -> Any:
    """transformers' cache for a model, with growing buffers in place of its attention layers' tensors.

    Layers of another kind, such as those of recurrent models, stay as they are.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    found = DynamicCache(config=config)
    for index, layer in enumerate(found.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            found.layers[index] = _layer_class()(getattr(layer, "sliding_window", None))
    return found


@cache
def _layer_class() -> Any:
    """``Growing`` as transformers' cache knows its layers; made late, since transformers is imported late."""
    from transformers.cache_utils import DynamicLayer

    return type("GrowingLayer", (Growing, DynamicLayer), {})


def _written(buffer: Tensor | None, new: Tensor, count: int) -> Tensor:
    """The buffer with new columns behind its first ``count``; a longer one, of the rows still there, if it is full."""
    rows, heads, length, size = new.shape
    if buffer is None or count + length > buffer.shape[2]:
        longer = new.new_empty(rows, heads, count + length + ROOM, size)
        if buffer is not None:
            longer[:, :, :count] = buffer[:rows, :, :count]
        buffer = longer
    buffer[:rows, :, count : count + length] = new
    return buffer


def _reordered(buffer: Tensor, index: Tensor, count: int) -> Tensor:
    if len(index) > len(buffer):
        return buffer[index]
    moved = (index != torch.arange(len(index), device=index.device)).nonzero()[:, 0]
    buffer[moved, :, :count] = buffer[index[moved], :, :count]
    return buffer
