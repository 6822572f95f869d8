"""Bytes of the tensors alive in a computation that is walked through without being done, on PyTorch's meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Within this context, counts the storage of every tensor that an operation makes, until it is freed.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes alive at once since ``mark``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def mark(self) -> int:
        """Forget the peak and return what is alive."""
        self.peak = self.live
        return self.live

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Never count these tensors' storage."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


FUSED = "fused_outline"
"""Name of ``fused_attention`` among transformers' attention functions, once it is registered."""


def register_attention() -> str:
    """Make ``fused_attention`` known to transformers, and return its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(FUSED, fused_attention)
    return FUSED


def fused_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention that computes nothing and keeps what the fused kernels of CPUs and GPUs keep, given a mask.

    On the meta device PyTorch would take its plain formula, which keeps a score for every pair of tokens.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:  # as transformers does before it calls a kernel with a mask
        key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    return _Attention.apply(query, key, value).transpose(1, 2), None


class _Attention(torch.autograd.Function):
    """Queries, keys, values, the output, and one number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, length, _ = query.shape
        # Its memory runs token by token, so that what reads it so needs no copy.
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(rows, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
