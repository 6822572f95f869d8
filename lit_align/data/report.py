"""What became of the data: read, kept, dropped and why, shortened, and how long it is in tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_align.data.collate import Group
from lit_align.data.rows import DataError

PLACES = 5  # example places kept for each reason
QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass
class Tally:
    """How often something happened, and where first."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.places) < PLACES:
            self.places.append(place)


@dataclass
class SplitReport:
    """One split; every row read is kept, dropped, or held out for validation.

    Attributes:
        source: What it was read from.
        read: Rows read.
        kept: Rows that are trained or validated on.
        held_out: Rows handed to validation.
        dropped: Reason to its tally; the row is gone.
        noted: What happened to rows that were kept, such as a shortened prompt, to its tally.
        tokens: Quantiles of token lengths of ``prompt``, ``chosen`` and ``rejected``, end of sequence included.
        length_ratio: Mean tokens of the best completions over mean tokens of the others; None where nothing was kept.
    """

    source: str
    read: int = 0
    kept: int = 0
    held_out: int = 0
    dropped: dict[str, Tally] = field(default_factory=dict)
    noted: dict[str, Tally] = field(default_factory=dict)
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)
    length_ratio: float | None = None

    def drop(self, reason: str, place: str) -> None:
        """Count a row that is left out."""
        self.dropped.setdefault(reason, Tally()).add(place)

    def note(self, what: str, place: str) -> None:
        """Count something that happened to a row that stays."""
        self.noted.setdefault(what, Tally()).add(place)

    @property
    def lost(self) -> int:
        """Rows dropped for any reason."""
        return sum(tally.count for tally in self.dropped.values())

    def measure(self, groups: Sequence[Group]) -> None:
        """Take the lengths of the groups that are kept."""
        self.kept = len(groups)
        if not groups:
            return
        chosen = torch.tensor([len(group.completion_ids[0]) for group in groups])
        rejected = torch.tensor([len(ids) for group in groups for ids in group.completion_ids[1:]])
        prompts = torch.tensor([len(group.prompt_ids) for group in groups])
        self.tokens = {
            name: _quantiles(x) for name, x in (("prompt", prompts), ("chosen", chosen), ("rejected", rejected))
        }
        self.length_ratio = (chosen.double().mean() / rejected.double().mean()).item()

    def check(self, max_dropped: float) -> None:
        """Refuse a split that lost too much.

        Args:
            max_dropped: Largest accepted share of dropped rows, in [0, 1].

        Raises:
            DataError: If nothing was kept, or the share dropped is larger; the message lists the reasons.
        """
        reasons = "\n  ".join(_counted(self.dropped))
        if self.read == self.lost:
            raise DataError(f"{self.source}: nothing is left of {self.read} rows; dropped:\n  {reasons}")
        share = self.lost / self.read
        if share > max_dropped:
            raise DataError(
                f"{self.source}: {self.lost} of {self.read} rows ({share:.0%}) were dropped, more than "
                f"max_dropped={max_dropped:g} "
                f"allows; correct the data, or set max_dropped (0 to 1) higher if this is meant. Dropped:\n  {reasons}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        tallies = {
            name: {reason: {"count": tally.count, "places": list(tally.places)} for reason, tally in tallies.items()}
            for name, tallies in (("dropped", self.dropped), ("noted", self.noted))
        }
        counts = {"source": self.source, "read": self.read, "kept": self.kept, "held_out": self.held_out}
        return {**counts, **tallies, "tokens": self.tokens, "length_ratio": self.length_ratio}


@dataclass
class DataReport:
    """The report of a run's data, one part for each split.

    Attributes:
        parts: "train", and "validation" where there is one.
    """

    parts: dict[str, SplitReport] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and the model card."""
        return {name: part.as_dict() for name, part in self.parts.items()}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, making the folder if need be."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def render(self) -> str:
        """A plain table: a row for each split, its lengths, and below it what was dropped or changed."""
        lines = [
            f"{'data':<12}{'read':>8}{'kept':>8}{'dropped':>9}   tokens: median/p99/max of prompt, chosen, rejected"
        ]
        for name, part in self.parts.items():
            spans = [f"{x['median']:g}/{x['p99']:g}/{x['max']:g}" for x in part.tokens.values()]
            ratio = "" if part.length_ratio is None else f"   chosen/rejected {part.length_ratio:.2f}"
            lines.append(f"{name:<12}{part.read:>8}{part.kept:>8}{part.lost:>9}   {'  '.join(spans)}{ratio}")
            lines.append(f"  from {part.source}" + (f", {part.held_out} rows held out" if part.held_out else ""))
            lines += [f"  dropped, {line}" for line in _counted(part.dropped)]
            lines += [f"  {line}" for line in _counted(part.noted)]
        return "\n".join(lines)


def _counted(tallies: dict[str, Tally]) -> list[str]:
    """The most frequent first."""
    ordered = sorted(tallies.items(), key=lambda item: -item[1].count)
    return [f"{reason}: {tally.count} ({_places(tally)})" for reason, tally in ordered]


def _places(tally: Tally) -> str:
    """The example places; what the first one has before its number is not repeated."""
    first = tally.places[0]
    stem = first[: max(first.rfind(":"), first.rfind("["), 0)]
    shown = [first, *(place.removeprefix(stem) for place in tally.places[1:])]
    return ", ".join(shown) + (", ..." if tally.count > len(tally.places) else "")


def _quantiles(lengths: Tensor) -> dict[str, float]:
    """Quantiles at data points (lower), so that every number is a length that occurs."""
    ordered = lengths.sort().values
    last = len(ordered) - 1
    return {name: float(ordered[int(share * last)]) for name, share in QUANTILES.items()}
