"""Everything a run measures: of its optimizer steps, of validation, and of fresh completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lit_align.batch import Batch, CompletionBatch, Loss, MixedBatch, Rollout, Scores, completions_of
from lit_align.freshness import FreshCompletions, Staleness
from lit_align.metrics import Throughput, standard_metrics


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
        self.staleness = Staleness()
        self.drawn = FreshCompletions()
        self._clock = 0.0

    def start(self) -> None:
        """A micro-batch begins."""
        self._clock = time.perf_counter()

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

    def count(self, batch: CompletionBatch) -> None:
        """A micro-batch is done: count its tokens and its time."""
        tokens = (batch.prompt_mask.sum() + batch.completion_mask.sum()).double()
        self.throughput.update(tokens, time.perf_counter() - self._clock)

    def fresh(self, rollout: Rollout, scores: Scores, ended: Tensor, seconds: float) -> None:
        """Add a fresh buffer; see ``FreshCompletions``."""
        self.drawn.update(rollout, scores, ended, seconds)

    def report(self) -> dict[str, Tensor]:
        """What was seen since the last report, logged name -> (), over all ranks."""
        found: dict[str, Any] = self.training_steps.compute()
        steps = {**self.throughput.compute(), **self.staleness.compute()}
        found |= {f"train/{name}": value for name, value in steps.items()}
        found |= {f"rollout/{name}": value for name, value in self.drawn.compute().items()}
        if self.drawn.seconds > 0:
            found["rollout/share_of_time"] = self.drawn.seconds / (self.drawn.seconds + self.throughput.seconds)
        for part in (self.training_steps, self.throughput, self.staleness, self.drawn):
            part.reset()
        return found
