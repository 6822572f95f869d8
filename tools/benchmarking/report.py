"""The tables, and the same as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from benchmarking.clock import Ratio, Timing
from benchmarking.experiments import TARGETS, Experiment, Target
from benchmarking.work import distinct_tokens


@dataclass
class Result:
    """What was measured of a side.

    Attributes:
        timing: Its seconds.
        memory: Bytes of a step beyond those held after loading, or None.
        padding: Share of the forward pass's places that hold no token, or None for products alone.
        flops: Of the first batch, for the limits.
    """

    timing: Timing
    memory: int | None
    padding: float | None
    flops: int | None = None


Results = Mapping[str, Mapping[str, Result]]
"""Experiment -> side -> what was measured."""


def tables(experiments: list[Experiment], results: Results) -> list[Table]:
    """One table for each experiment and one of the targets."""
    found = [_table(one, results[one.key]) for one in experiments]
    judged = verdicts(results)
    return [*found, _targets(judged)] if judged else found


def _table(experiment: Experiment, results: Mapping[str, Result]) -> Table:
    table = Table(title=f"{experiment.key}: {experiment.work.name}, model {experiment.shape}")
    table.add_column("side")
    columns = ("tokens/s", "step, wall s", "× wall (range)", "1 thread, CPU s", "× CPU (range)", "peak MB", "× MB")
    for name in (*columns, "padding"):
        table.add_column(name, justify="right")
    first = results[experiment.sides[0]]
    tokens = useful(experiment, len(first.timing.cpu))
    for name, result in results.items():
        timing = result.timing
        rates = [count / seconds for count, seconds in zip(tokens, timing.wall or timing.cpu, strict=True)]
        table.add_row(
            name,
            f"{statistics.median(rates):,.0f}",
            f"{statistics.median(timing.wall):.2f}" if timing.wall else "",
            _ratio(Ratio.of(timing.wall, first.timing.wall)) if timing.wall else "",
            f"{statistics.median(timing.cpu):.2f}",
            _ratio(Ratio.of(timing.cpu, first.timing.cpu)),
            "" if result.memory is None else f"{result.memory / 1e6:,.0f}",
            "" if result.memory is None or not first.memory else f"{result.memory / first.memory:.2f}",
            "" if result.padding is None else f"{result.padding:.1%}",
        )
    return table


def useful(experiment: Experiment, repeats: int) -> list[int]:
    """Distinct tokens of each repeat's batch."""
    batches = experiment.work.batches
    return [distinct_tokens(batches[number % len(batches)]) for number in range(repeats)]


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


@dataclass
class Verdict:
    """What became of a target.

    Attributes:
        wall: The ratio of wall times, or None where it was not measured or the target is one of memory.
        cpu: That of CPU seconds on one thread, or None for memory.
        memory: That of peak memory, or None for time.
        reached: Whether the bound is reached: by wall time where there is one, else by CPU time.
    """

    wall: Ratio | None
    cpu: Ratio | None
    memory: float | None
    reached: bool

    @classmethod
    def of(cls, target: Target, results: Results) -> Verdict | None:
        """None where the target's measure was not taken."""
        above, below = (results[target.key][name] for name in (target.above, target.below))
        if target.measure == "memory":
            if above.memory is None or not below.memory:
                return None
            ratio = above.memory / below.memory
            return cls(None, None, ratio, target.holds(ratio))
        wall = Ratio.of(above.timing.wall, below.timing.wall) if above.timing.wall else None
        cpu = Ratio.of(above.timing.cpu, below.timing.cpu)
        return cls(wall, cpu, None, target.holds((wall or cpu).median))


def verdicts(results: Results) -> list[tuple[Target, Verdict]]:
    """Every target both sides of which were measured."""
    there = [one for one in TARGETS if one.key in results and {one.above, one.below} <= set(results[one.key])]
    return [(one, found) for one in there if (found := Verdict.of(one, results)) is not None]


def _targets(found: list[tuple[Target, Verdict]]) -> Table:
    table = Table(title="targets")
    table.add_column("")
    for name in ("target", "wall", "CPU, 1 thread", "memory", "reached"):
        table.add_column(name, justify="right")
    for target, verdict in found:
        times = [_ratio(ratio) if ratio else "" for ratio in (verdict.wall, verdict.cpu)]
        memory = "" if verdict.memory is None else f"{verdict.memory:.2f}"
        bound = f"{'≥' if target.least else '≤'} {target.bound:g}"
        table.add_row(target.text, bound, *times, memory, "yes" if verdict.reached else "no")
    return table


def as_json(experiments: list[Experiment], results: Results, threads: int) -> dict[str, Any]:
    """All that was measured, with what it was measured on."""
    import peft
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__}
    return {
        "machine": {"threads": threads, "processor": platform.machine(), "load": os.getloadavg()},
        "versions": versions | {"transformers": transformers.__version__},
        "experiments": [
            {
                "key": one.key,
                "work": one.work.name,
                "shape": one.shape,
                "tokens": useful(one, len(results[one.key][one.sides[0]].timing.cpu)),
                "sides": {name: asdict(result) for name, result in results[one.key].items()},
            }
            for one in experiments
        ],
        "targets": [target._asdict() | asdict(verdict) for target, verdict in verdicts(results)],
    }
