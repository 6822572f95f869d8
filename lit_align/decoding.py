"""Reading one more token of many rows: with a cache of keys and values that grows in place, or the whole row again."""

from __future__ import annotations

import inspect
import logging
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

ROOM = 64
"""Tokens a cache has room for beyond those it holds, whenever it grows: between two growths nothing is copied."""


class Decoding(Protocol):
    """R rows that are read token by token; H is the hidden size."""

    def begin(self, ids: Tensor, mask: Tensor, copies: Tensor) -> Tensor:
        """Read B prompts once, then continue R rows from them.

        Args:
            ids: Token ids of the prompts, int64 (B, P).
            mask: True where ``ids`` holds a token, bool (B, P); every prompt has one.
            copies: The prompt each row continues, int64 (R,).

        Returns:
            The last hidden state of each row, (R, H).
        """
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token of each row, int64 (R,), and return its last hidden state, (R, H)."""
        ...

    def keep(self, index: Tensor) -> None:
        """Go on with some of the rows only, int64 (R',); best where most of them stay where they were."""
        ...


def has_cache(model: Any) -> bool:
    """Whether the model can read one token at a time; says in the log what happens otherwise."""
    if "past_key_values" in _arguments(model) and model._supports_default_dynamic_cache():
        return True
    log.warning(
        "%s models keep no cache of keys and values that lit_align knows: "
        "each sampled token reads its whole row again, which is slow",
        model.config.model_type,
    )
    return False


def decoding(model: Any, cached: bool) -> Decoding:
    """A fresh start of reading rows with a causal language model.

    Args:
        model: A causal language model of transformers.
        cached: What ``has_cache`` says of it.
    """
    return CachedDecoding(model) if cached else PlainDecoding(model)


class CachedDecoding:
    """Rows whose past keys and values are kept. Prompts are padded on the left, so that all rows grow at one place.

    Args:
        model: A causal language model.
    """

    def __init__(self, model: Any) -> None:
        self.network = model.base_model
        self.cache = growing_cache(model.config)
        self.positioned = "position_ids" in _arguments(model)
        self.mask: Tensor | None = None

    def begin(self, ids: Tensor, mask: Tensor, copies: Tensor) -> Tensor:
        """Read the prompts; their part of the cache is then copied to the rows."""
        order = mask.int().argsort(dim=1, stable=True)[:, -int(mask.sum(-1).max()) :]
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        # Without padding no mask is needed, and attention takes its faster paths.
        self.mask = None if mask.all() else mask
        hidden = self._read(ids, (mask.cumsum(-1) - 1).clamp(min=0))
        self.cache.reorder_cache(copies)
        self.mask = None if self.mask is None else mask[copies]
        self.position = mask.sum(-1)[copies, None]
        return hidden[copies]

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each row."""
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=True)
        hidden = self._read(tokens[:, None], self.position)
        self.position = self.position + 1
        return hidden

    def keep(self, index: Tensor) -> None:
        """Select rows; the cache moves only those whose place changes."""
        self.cache.reorder_cache(index)
        self.mask = None if self.mask is None else self.mask[index]
        self.position = self.position[index]

    def _read(self, ids: Tensor, position: Tensor) -> Tensor:
        output = self.network(
            input_ids=ids,
            attention_mask=None if self.mask is None else self.mask.long(),
            past_key_values=self.cache,
            use_cache=True,
            **({"position_ids": position} if self.positioned else {}),
        )
        return output.last_hidden_state[:, -1]


class PlainDecoding:
    """Rows that are read from their start at every step, padded on the right: exact for any causal model, and slow.

    Args:
        model: A causal language model.
    """

    def __init__(self, model: Any) -> None:
        self.network = model.base_model

    def begin(self, ids: Tensor, mask: Tensor, copies: Tensor) -> Tensor:
        """Read the prompts."""
        order = (~mask).int().argsort(dim=1, stable=True)[:, : int(mask.sum(-1).max())]
        self.ids, self.mask = ids.gather(1, order), mask.gather(1, order)
        hidden = self._read()
        self.keep(copies)
        return hidden[copies]

    def step(self, tokens: Tensor) -> Tensor:
        """Put a token behind each row and read all of it."""
        end = self.mask.sum(-1, keepdim=True)
        self.ids = F.pad(self.ids, (0, 1)).scatter(1, end, tokens[:, None])
        self.mask = F.pad(self.mask, (0, 1)).scatter(1, end, True)
        return self._read()

    def keep(self, index: Tensor) -> None:
        """Select rows."""
        self.ids, self.mask = self.ids[index], self.mask[index]

    def _read(self) -> Tensor:
        output = self.network(input_ids=self.ids, attention_mask=self.mask.long(), use_cache=False)
        return output.last_hidden_state[torch.arange(len(self.ids), device=self.ids.device), self.mask.sum(-1) - 1]


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


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(model.base_model.forward).parameters)
