"""Timing of sides that take turns on the same batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarking.sides import Side
from lit_align.data.collate import Group


@dataclass
class Timing:
    """Seconds of each repeat; repeat n of every side ran on the same batch, one right after the other.

    Attributes:
        wall: Wall time of a step on all threads; empty where it was left out.
        cpu: CPU time of a step on one thread.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass
class Ratio:
    """A ratio of one side's seconds to another's, repeat by repeat.

    Attributes:
        median: The middle one.
        low: The smallest.
        high: The largest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """Of paired measurements, one for each repeat."""
        values = [one / other for one, other in zip(above, below, strict=True)]
        return cls(statistics.median(values), min(values), max(values))


def take_turns(
    sides: Mapping[str, Side],
    batches: Sequence[Sequence[Group]],
    repeats: int,
    threads: int,
    say: Callable[[str], None],
) -> dict[str, Timing]:
    """Time each side on each repeat's batch, in an order that moves on by one with every repeat.

    Args:
        sides: Name -> side.
        batches: Repeat n takes batch n, from the first again after the last.
        repeats: Timed steps of each side, for wall and for CPU time, >= 1.
        threads: Threads for the wall time; 0 leaves it out.
        say: Told what is under way.
    """
    found = {name: Timing() for name in sides}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for side in sides.values():
        side.prepare(batches[0][:1])
        side.step(batches[0][:1])  # first calls allocate, import and choose kernels
    names = list(sides)
    for number in range(repeats):
        batch = batches[number % len(batches)]
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            say(f"repeat {number + 1}/{repeats}, {name}")
            sides[name].prepare(batch)
            if threads:
                torch.set_num_threads(threads)
                begin = time.perf_counter()
                sides[name].step(batch)
                found[name].wall.append(time.perf_counter() - begin)
                sides[name].prepare(batch)
            torch.set_num_threads(1)
            begin = time.process_time()
            sides[name].step(batch)
            found[name].cpu.append(time.process_time() - begin)
    torch.set_num_threads(before)
    return found
