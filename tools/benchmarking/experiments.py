"""What is compared with what, and what the figures are judged by."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from benchmarking.sides import Limit, Ours, Side
from benchmarking.work import Work, bucketed, real_data, real_pairs, shuffled, synthetic

SIDES: dict[str, tuple[Callable[..., Side] | None, dict[str, Any]]] = {
    "ours": (Ours, {}),
    "ours, ε-DPO": (Ours, {"epsilon": 0.01}),
    "ours, with KL": (Ours, {"kl": True}),
    "ours, separate rows": (Ours, {"trees": False}),
    "ours, empty cache": (Ours, {"known": False}),
    "ours, full cache": (Ours, {"known": True}),
    "TRL": (None, {}),
    "TRL, head as on a GPU": (None, {"checkpointing": False, "compact": True}),
    "limit": (Limit, {}),
    "limit, reference known": (Limit, {"cached": True}),
    "limit, head everywhere": (Limit, {"everywhere": True}),
}
"""Name -> class and arguments; None is TRL, whose import takes seconds."""


def build(name: str, model: str) -> Side:
    """A side of ``SIDES``.

    Args:
        name: Its name.
        model: Folder of the model.
    """
    side, options = SIDES[name]
    if side is None:
        from benchmarking.theirs import Theirs

        side = Theirs
    return side(model, **options)


class Experiment(NamedTuple):
    """Sides that take turns on the same batches.

    Attributes:
        key: What ``--only`` takes.
        shape: A key of ``models.SHAPES``.
        work: The batches.
        sides: Keys of ``SIDES``; the first is what the others are set against.
        memory: Whether peak memory is measured too.
    """

    key: str
    shape: str
    work: Work
    sides: tuple[str, ...]
    memory: bool = True


class Target(NamedTuple):
    """A ratio of two sides and what it should be.

    Attributes:
        text: What it says.
        key: The experiment.
        above: The side above the line of the ratio.
        below: The side below.
        measure: What of them.
        bound: The value to reach.
        least: Whether the ratio should be at least that, or at most.
    """

    text: str
    key: str
    above: str
    below: str
    measure: Literal["time", "memory"]
    bound: float
    least: bool

    def holds(self, ratio: float) -> bool:
        """Whether a measured ratio reaches the bound."""
        return ratio >= self.bound if self.least else ratio <= self.bound


LIMITS = ("limit", "limit, head everywhere")
CACHED = ("ours, empty cache", "ours, full cache", "limit, reference known")

TARGETS = [
    Target("pairs a second against TRL at its defaults", "hh", "TRL", "ours", "time", 10, True),
    Target("the same, batches by length on both sides", "hh-by-length", "TRL", "ours", "time", 1.5, True),
    Target("K = 8 behind one prompt against separate rows", "k8", "ours, separate rows", "ours", "time", 3, True),
    Target("peak memory against TRL at its defaults", "hh", "ours", "TRL", "memory", 0.18, False),
    Target("ε-DPO step against DPO step, 32k words: time", "epsilon-32k", "ours, ε-DPO", "ours", "time", 1.15, False),
    Target("ε-DPO, 32k words: memory", "epsilon-32k", "ours, ε-DPO", "ours", "memory", 1.05, False),
    Target("ε-DPO step against DPO step, 150k words: time", "epsilon-150k", "ours, ε-DPO", "ours", "time", 1.15, False),
    Target("ε-DPO, 150k words: memory", "epsilon-150k", "ours, ε-DPO", "ours", "memory", 1.05, False),
    Target("share of the physical limit", "hh", "limit, head everywhere", "ours", "time", 0.85, True),
    Target("share of the physical limit, wider model", "wide", "limit, head everywhere", "ours", "time", 0.85, True),
]


def full(count: int) -> list[Experiment]:
    """The whole table.

    Args:
        count: Batches of each kind.
    """
    folder = real_data()
    if folder is None:
        mixed = even = synthetic(150, 60, 2, 8, count, 32000, spread=0.9)
    else:
        pairs = real_pairs(folder, None)
        mixed, even = shuffled(pairs, 8, count), bucketed(pairs, 8, count)
    large = synthetic(150, 60, 2, 8, count, 150_000, spread=0.5)
    return [
        Experiment("hh", "25M", mixed, ("ours", "ours, with KL", "TRL", "TRL, head as on a GPU", *LIMITS)),
        Experiment("hh-by-length", "25M", even, ("ours", "TRL", *LIMITS)),
        Experiment("k2", "25M", synthetic(256, 32, 2, 8, count, 32000), ("ours", "ours, separate rows", "TRL")),
        Experiment("k8", "25M", synthetic(256, 32, 8, 4, count, 32000), ("ours", "ours, separate rows", "TRL")),
        Experiment("epsilon-32k", "25M", mixed, ("ours", "ours, ε-DPO")),
        Experiment("epsilon-150k", "25M, 150k words", large, ("ours", "ours, ε-DPO")),
        Experiment("cache", "25M", mixed, CACHED, memory=False),
        Experiment("wide", "85M", even, ("ours", *LIMITS)),
    ]


def quick() -> list[Experiment]:
    """Every kind of row in a minute or two, on a model too small to say anything."""
    folder = real_data()
    if folder is None:
        pairs = synthetic(40, 20, 2, 2, 2, 32000, spread=0.5)
    else:
        pairs = shuffled(sorted(real_pairs(folder, 40), key=lambda group: len(group.prompt_ids))[:8], 2, 2)
    short = synthetic(32, 8, 8, 2, 2, 32000)
    theirs = ("TRL",) if find_spec("trl") else ()
    return [
        Experiment("hh", "tiny", pairs, ("ours", *theirs, "limit")),
        Experiment("k8", "tiny", short, ("ours", "ours, separate rows"), memory=False),
        Experiment("epsilon-32k", "tiny", pairs, ("ours", "ours, ε-DPO"), memory=False),
        Experiment("cache", "tiny", pairs, CACHED, memory=False),
    ]


def smallest() -> list[Experiment]:
    """One row without data or TRL, for a test of the tool."""
    return [Experiment("k8", "tiny", synthetic(8, 3, 8, 2, 1, 32000), ("ours", "ours, separate rows", "limit"))]


def chosen(size: str, count: int, only: list[str]) -> list[Experiment]:
    """The experiments asked for."""
    found = {"full": lambda: full(count), "quick": quick, "smallest": smallest}[size]()
    unknown = set(only) - {one.key for one in found}
    if unknown:
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: there are {', '.join(one.key for one in found)}")
    return [one for one in found if not only or one.key in only]
