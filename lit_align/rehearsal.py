"""The passes of training gone through on the meta device, where tensors have shapes and no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_align.ledger import Ledger


@dataclass(frozen=True)
class Pass:
    """Bytes of the three passes for some number of rows.

    Attributes:
        reference: Most that is alive in the reference's pass.
        kept: What is alive after the policy's pass.
        backward: Most that is alive in the backward pass, without the adapter's gradient.
    """

    reference: int
    kept: int
    backward: int

    def along(self, other: Pass, rows: int) -> Pass:
        """For ``rows`` rows, where this is for one and ``other`` for two."""
        both = zip(self._values(), other._values(), strict=True)
        return Pass(*(one + (two - one) * (rows - 1) for one, two in both))

    def _values(self) -> tuple[int, int, int]:
        return self.reference, self.kept, self.backward


def walk(model: Any, rows: int, length: int) -> Pass:
    """Add up what is alive in the passes, without attention masks and the vocabulary head.

    Args:
        model: The policy on the meta device, with its adapter.
        rows: Rows R, >= 1.
        length: Tokens N of a row, >= 1.
    """
    base, ledger = model.get_base_model(), Ledger()
    ledger.ignore([*model.parameters(), *model.buffers()])
    with torch.device("meta"), ledger:
        inputs = _inputs(rows, length, base.dtype)
        with torch.no_grad(), model.disable_adapter():
            ledger.mark()
            hidden = base.base_model(**inputs, use_cache=False).last_hidden_state
            reference = ledger.peak
        start = base.base_model(**inputs, use_cache=False).last_hidden_state
        kept = ledger.mark() - hidden.nbytes
        torch.autograd.backward(start, torch.empty_like(start))
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        backward = ledger.peak - gradients - hidden.nbytes
    model.zero_grad()
    return Pass(reference, kept, backward)


def _inputs(rows: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    mask = torch.zeros(1, 1, 1, 1, dtype=dtype)  # its size depends on the layout, and is for the caller to add
    return {"input_ids": ids, "position_ids": torch.zeros_like(ids), "attention_mask": mask}
