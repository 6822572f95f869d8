"""The buffer of fresh completions as a loader: one pass of it is one iteration, and its state resumes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Rollout
from lit_align.data.fresh import NothingToLearn
from lit_align.data.rows import DataError

log = logging.getLogger(__name__)

Collect = Callable[[int], tuple[Rollout, int]]
"""Prompts this rank has had, to a fresh buffer and the prompts it has then had."""


class BufferLoader:
    """Collects a buffer when the first batch of a pass is asked for, then hands it out in minibatches, several times.

    It has a length, so that Lightning fetches no batch ahead: each collection happens after the optimizer step of the
    batch before it. A pass that was begun is not gone on with, except after ``load_state_dict``.

    Args:
        collect: Fills a buffer.
        batches: Micro-batches of one sweep over the buffer, >= 1; groups are dealt to them as evenly as can be.
        sweeps: Sweeps over a buffer, >= 1, each in a new order.
        seed: Of these orders.
        rank: This process.
        gather: Every rank's value of something, on every rank; the checkpoint of one rank holds all buffers.
        settings: What a checkpoint must agree with; ``devices`` is the number of ranks.
        stop: Ends the run after this pass.

    Raises:
        NothingToLearn: If already the first buffer cannot be learned from. Later that is an end, since a policy whose
            completions all earn the same has nothing left to learn: the run stops, with a warning.
    """

    def __init__(
        self,
        collect: Collect,
        batches: int,
        sweeps: int,
        seed: int,
        rank: int,
        gather: Callable[[Any], list[Any]],
        settings: dict[str, Any],
        stop: Callable[[], None],
    ) -> None:
        self.collect, self.batches, self.sweeps, self.seed, self.rank = collect, batches, sweeps, seed, rank
        self.gather, self.settings, self.stop = gather, settings, stop
        self.buffer: Rollout | None = None
        self.iteration = self.position = self.place = 0
        self._resumed = False

    def __len__(self) -> int:
        return self.batches * self.sweeps

    def __iter__(self) -> Iterator[Rollout]:
        if not self._resumed or self.position >= len(self):
            try:
                self.buffer, self.place = self.collect(self.place)
            except NothingToLearn as reason:
                if self.iteration == 0:
                    raise
                log.warning("training ends after %d iterations: %s", self.iteration, reason)
                self.stop()
                return
            self.iteration += 1
            self.position = 0
        self._resumed = False
        buffer = self.buffer
        assert buffer is not None
        for index in self._order(len(buffer.completions.row))[self.position :]:
            self.position += 1
            yield buffer.rows(index)

    def _order(self, groups: int) -> list[Tensor]:
        """Which groups make each micro-batch of this pass."""
        found: list[Tensor] = []
        for sweep in range(self.sweeps):
            digest = hashlib.sha256(f"{self.seed} {self.iteration} {sweep}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
            found += torch.randperm(groups, generator=generator).tensor_split(self.batches)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The buffers of all ranks and the place in them; every rank must ask."""
        own = {"buffer": None if self.buffer is None else packed(self.buffer), "place": self.place}
        where = {"iteration": self.iteration, "position": self.position, "of": len(self), "for": self.settings}
        return {**where, "ranks": self.gather(own)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which the state was saved.

        Raises:
            DataError: If the sizes of buffer and minibatch have changed since.
        """
        saved = state["for"]
        changed = [
            f"{name} was {saved.get(name)}, is {now}" for name, now in self.settings.items() if saved.get(name) != now
        ]
        if changed and 0 < state["position"] < state["of"]:
            raise DataError(
                f"cannot resume in the middle of a buffer: {'; '.join(changed)}. Set these back, or resume from a "
                "checkpoint of the end of an iteration"
            )
        self.iteration, self.position = state["iteration"], state["position"]
        ranks, now = state["ranks"], self.settings["devices"]
        # Ranks take turns in the stream. Where there are others now, what any of them can have had is not dealt again.
        dealt = max(rank["place"] for rank in ranks) * len(ranks)
        self.place = ranks[self.rank]["place"] if len(ranks) == now else -(-dealt // now)
        own = ranks[self.rank]["buffer"] if self.rank < len(ranks) else None
        self.buffer = None if own is None else unpacked(own)
        self._resumed = self.buffer is not None and not changed


def packed(rollout: Rollout) -> dict[str, Tensor]:
    """A rollout as named tensors, without what is None."""
    named = {f"completions.{name}": value for name, value in rollout.completions._asdict().items()}
    named |= {name: value for name, value in rollout._asdict().items() if name != "completions"}
    return {name: value for name, value in named.items() if value is not None}


def unpacked(named: dict[str, Tensor]) -> Rollout:
    """The rollout of which ``packed`` made the tensors."""
    completions = CompletionBatch._make(named.get(f"completions.{name}") for name in CompletionBatch._fields)
    rest = {name: named.get(name) for name in Rollout._fields if name != "completions"}
    return Rollout(completions, **rest)
