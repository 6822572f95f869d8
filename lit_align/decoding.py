"""Reading one more token of many rows: with a cache of keys and values that grows in place, or the whole row again."""

from __future__ import annotations

import inspect
import logging
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_align.kv_cache import growing_cache

log = logging.getLogger(__name__)


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


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(model.base_model.forward).parameters)
