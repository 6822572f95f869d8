"""AdamW and its schedule over the steps a run is going to take."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_align.settings import OptimSettings, usual_learning_rate

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

log = logging.getLogger(__name__)


def scheduled_adamw(
    trained: Sequence[nn.Parameter], settings: OptimSettings, size: int, total: int | None
) -> OptimizerLRSchedulerConfig:
    """AdamW, and a schedule that moves at each optimizer step, as Lightning takes them.

    Args:
        trained: What is trained.
        settings: Step size, weight decay and schedule.
        size: Parameters of the base model, > 0; the step size follows from it where none is set.
        total: Optimizer steps of the run, >= 1; None for a run without an end, whose step size stays at its peak.
    """
    rate = settings.learning_rate
    if rate is None:
        rate = usual_learning_rate(size)
        log.info("learning rate %.2g, by the size of the model; model.optim.learning_rate sets another", rate)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=settings.weight_decay)
    if total is None:
        log.warning("neither trainer.max_steps nor max_epochs ends this run: the step size stays at its peak")
    factor = (lambda _: 1.0) if total is None else (lambda step: settings.factor(step, total))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def planned_steps(trainer: Any) -> int | None:
    """Optimizer steps of a run; ``trainer.estimated_stepping_batches`` would build and drain a loader.

    Args:
        trainer: Lightning's, with a data module that has ``train_batches``.

    Returns:
        The number, >= 1; None for a run that only time or the user ends.
    """
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches: int = trainer.datamodule.train_batches(trainer.world_size)
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        limits.append(max(1, math.ceil(batches / trainer.accumulate_grad_batches)) * trainer.max_epochs)
    return min(limits, default=None)
