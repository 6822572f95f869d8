"""Everything a run measures: of its optimizer steps, of validation, and of fresh completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lit_align.batch import Batch, Loss, MixedBatch, Rollout, Scores, completions_of
from lit_align.freshness import FreshCompletions, Staleness
from lit_align.metrics import SumMetric, Throughput, standard_metrics


class Padding(SumMetric):
    """Share of the cells of the training passes that hold no token, in [0, 1); ``padding``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(["padding"], **kwargs)

    def update(self, cells: Tensor) -> None:
        """Add some passes.

        Args:
            cells: Their cells without a token, and all their cells, (2,).
        """
        self._add("padding", cells[0] / cells[1].clamp(min=1), cells[1])


class Monitor(nn.Module):
    """The metrics of a module, part of its state, so that a resumed run goes on counting.

    Args:
        stats: Names of the scalars its objective reports in ``Loss.stats``.
    """

    def __init__(self, stats: Sequence[str] = ()) -> None:
        super().__init__()
        self.training_steps = standard_metrics(stats).clone(prefix="train/")
        self.validation = standard_metrics(stats).clone(prefix="val/")
        self.throughput = Throughput()
        self.padding = Padding()
        self.staleness = Staleness()
        self.drawn = FreshCompletions()
        self.drawing = Throughput()
        self._clock = 0.0
        self._marked: list[tuple[Metric, dict[str, Any]]] = []
        self._cells: Tensor | None = None

    def start(self, cells: Tensor) -> None:
        """A micro-batch begins.

        Args:
            cells: Of all passes before it, without a token and all, (2,).
        """
        self._clock, self._cells = time.perf_counter(), cells

    def trained(self, batch: Batch, scores: Scores | None, loss: Loss, step: int) -> None:
        """Add a micro-batch of training.

        Args:
            batch: As the loader gave it.
            scores: Of its completions, or None.
            loss: Of it.
            step: Optimizer steps taken before it.
        """
        self.training_steps.update(completions_of(batch), scores, loss)
        if isinstance(batch, MixedBatch):
            self.staleness.update(batch.samples, None, step)
        elif isinstance(batch, Rollout):
            self.staleness.update(batch, scores, step)

    def mark(self) -> None:
        """Remember what was seen so far; metrics replace their states and never change them in place."""
        parts = [*self.training_steps.values(), self.staleness]
        self._marked = [(part, part.metric_state) for part in parts]

    def rewind(self) -> None:
        """Forget the micro-batches since ``mark``, but not their time."""
        for part, state in self._marked:
            for name, value in state.items():
                setattr(part, name, value)

    def count(self, batch: Batch, cells: Tensor) -> None:
        """A micro-batch is done: count its tokens, samples included, its time and its padding.

        Args:
            batch: As the loader gave it.
            cells: Of all passes until now, without a token and all, (2,).
        """
        parts = [completions_of(batch), *([batch.samples.completions] if isinstance(batch, MixedBatch) else [])]
        tokens = torch.stack([part.prompt_mask.sum() + part.completion_mask.sum() for part in parts]).sum()
        self.throughput.update(tokens.double(), time.perf_counter() - self._clock)
        self.padding.update(cells if self._cells is None else cells - self._cells)

    def fresh(self, rollout: Rollout, scores: Scores, ended: Tensor, seconds: float) -> None:
        """Add a fresh buffer, and the time it took to draw and to judge it; see ``FreshCompletions``."""
        self.drawn.update(rollout, scores, ended)
        self.drawing.update(rollout.completions.lengths.sum().double(), seconds)

    def report(self) -> dict[str, Tensor]:
        """What was seen since the last report, logged name -> (), over all ranks."""
        found: dict[str, Any] = self.training_steps.compute()
        steps = {**self.throughput.compute(), **self.padding.compute(), **self.staleness.compute()}
        found |= {f"train/{name}": value for name, value in steps.items()}
        fresh = {**self.drawn.compute(), **self.drawing.compute()}
        found |= {f"rollout/{name}": value for name, value in fresh.items()}
        if self.drawing.seconds > 0:
            found["rollout/share_of_time"] = self.drawing.seconds / (self.drawing.seconds + self.throughput.seconds)
        for part in (self.training_steps, self.throughput, self.padding, self.staleness, self.drawn, self.drawing):
            part.reset()
        return found


class AfterBatch(Callback):
    """Lets a module count and report a micro-batch before a checkpoint is made, so that it is part of it."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Report; modules' own hooks of this name come after those of all callbacks."""
        pl_module.after_batch(batch)  # type: ignore[operator]


def write_row(module: LightningModule, values: dict[str, Any]) -> None:
    """Log what a step showed, to the loggers at once: Lightning writes after checkpoints, and a run may end in one.

    Args:
        module: A module within ``on_train_batch_end``.
        values: Logged name -> value.
    """
    trainer = module.trainer
    module.log_dict(values, on_step=True, on_epoch=False, logger=False)
    numbers = {name: float(value) for name, value in values.items()} | {"epoch": trainer.current_epoch}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=trainer.global_step - 1)  # as Lightning counts them, from 0
        logger.save()
