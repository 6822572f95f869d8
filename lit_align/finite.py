"""Optimizer steps with a loss or a gradient that is not finite: skipped, written down, and after a few the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.nn.utils import get_total_norm

from lit_align.errors import UserError

log = logging.getLogger(__name__)

LIMIT = 3
"""Steps in a row that may be skipped."""
RECORD = "skipped_steps.jsonl"
"""File in the run folder with the rows of each skipped step."""


class FiniteSteps(Callback):
    """Keeps weights and optimizer finite: a step whose loss or gradient is not finite on any rank is not taken.

    Without gradients AdamW leaves a parameter, its moments and its decay alone, so they are dropped. With a gradient
    scaler (trainer.precision 16-mixed) an infinite gradient of a finite loss is usual while it looks for its scale,
    and counts as a fault only once the scale is down to 1. The count is in the checkpoint.

    Attributes:
        skipped: Whether the step just taken was none.
        total: Steps skipped in this run.
    """

    def __init__(self) -> None:
        self.skipped = False
        self.total = 0
        self._in_a_row = 0
        self._parts: list[tuple[Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped, and how many of them just now."""
        return {"total": self.total, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.total, self._in_a_row = state_dict["total"], state_dict["in_a_row"]

    @property
    def step_begins(self) -> bool:
        """Whether no micro-batch of the present step has been seen yet."""
        return not self._parts

    def saw(self, rows: Tensor, loss: Tensor) -> None:
        """Note a micro-batch.

        Args:
            rows: Its rows in the source, (B,).
            loss: Its summed loss, ().
        """
        self._parts.append((rows, loss.detach()))

    def check(self, module: LightningModule) -> None:
        """Drop the gradients of a step that is to be skipped; called when they are complete.

        Raises:
            UserError: If too many steps in a row are not finite, with the rows of the last.
        """
        parts, self._parts = self._parts, []
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        losses = torch.stack([loss.double() for _, loss in parts])
        signs = torch.stack([losses.isfinite().all(), get_total_norm(gradients).isfinite().to(losses.device)])
        loss_fits, gradient_fits = signs.tolist()  # the one time that a step waits for the device
        strategy = module.trainer.strategy
        self.skipped = strategy.reduce_boolean_decision(not (loss_fits and gradient_fits), all=False)
        if not self.skipped:
            self._in_a_row = 0
            return
        for parameter in module.parameters():
            parameter.grad = None
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        faulty_loss = strategy.reduce_boolean_decision(not loss_fits, all=False)
        if faulty_loss or scaler is None or scaler.get_scale() <= 1:
            self._note(module, parts, losses, faulty_loss)

    def _note(self, module: LightningModule, parts: list[Any], losses: Tensor, faulty_loss: bool) -> None:
        self.total += 1
        self._in_a_row += 1
        values = losses.tolist()
        blamed = [
            (rows.tolist(), value)
            for (rows, _), value, fits in zip(parts, values, losses.isfinite().tolist(), strict=True)
            if not (faulty_loss and fits)
        ]
        trainer = module.trainer
        ranks: list[Any] = [blamed]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, blamed)
        found = [one for rank in ranks for one in rank]
        rows = sorted({row for rows, _ in found for row in rows})
        what = "loss" if faulty_loss else "gradient"
        path = Path(trainer.default_root_dir) / RECORD
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            step = trainer.global_step + 1
            record = {"step": step, "not_finite": what, "rows": rows, "losses": [str(value) for _, value in found]}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            log.warning(
                "STEP %d SKIPPED, its %s is not finite; the weights stay as they are. Data rows %s, also in %s",
                step, what, shortened(rows), path,
            )  # fmt: skip
        if self._in_a_row > LIMIT:
            raise UserError(
                f"the {what} of {self._in_a_row} optimizer steps in a row was not finite, at last with data rows "
                f"{shortened(rows)}: the run ends with the weights of step {trainer.global_step - LIMIT}. Look at the "
                f"rows in {path}, or lower model.optim.learning_rate"
            )


def shortened(rows: Iterable[int], most: int = 8) -> str:
    """The first few of some row numbers."""
    listed = [str(row) for row in rows]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
