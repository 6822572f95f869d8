"""What became of the data: read, kept, dropped and why, shortened, and how long it is in tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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


Roles = dict[str, list[Tensor]]
"""Completions by the part they play, such as "chosen" and "rejected"; the order is that of the report's columns."""


def chosen_and_rejected(groups: Sequence[Group]) -> Roles:
    """The best completion of each group, and all others."""
    others = [ids for group in groups for ids in group.completion_ids[1:]]
    return {"chosen": [group.completion_ids[0] for group in groups], "rejected": others}


@dataclass
class SplitReport:
    """One split; every row read is kept, dropped, left out, or held out for validation.

    Attributes:
        source: What it was read from.
        read: Rows read.
        kept: Rows that are trained or validated on.
        held_out: Rows handed to validation.
        groups: Groups made of the rows that are kept; a row may give several.
        completions: How many completions play each part, such as ``chosen`` and ``rejected``.
        dropped: Reason to its tally; the row is lost.
        left_out: Reason to its tally; the row is sound, but was not asked for.
        noted: What happened to rows that were kept, such as a shortened prompt, to its tally.
        tokens: Quantiles of token lengths of ``prompt`` and of the completions by part, end of sequence included.
        length_ratio: Mean tokens of the first part's completions over mean tokens of the second's, as of the chosen
            over the rejected; None where there are not both.
    """

    source: str
    read: int = 0
    kept: int = 0
    held_out: int = 0
    groups: int = 0
    completions: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, Tally] = field(default_factory=dict)
    left_out: dict[str, Tally] = field(default_factory=dict)
    noted: dict[str, Tally] = field(default_factory=dict)
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)
    length_ratio: float | None = None

    def drop(self, reason: str, place: str) -> None:
        """Count a row that is of no use."""
        self.dropped.setdefault(reason, Tally()).add(place)

    def leave_out(self, reason: str, place: str) -> None:
        """Count a sound row that was not asked for; it does not count as lost."""
        self.left_out.setdefault(reason, Tally()).add(place)

    def note(self, what: str, place: str) -> None:
        """Count something that happened to a row that stays."""
        self.noted.setdefault(what, Tally()).add(place)

    @property
    def lost(self) -> int:
        """Rows dropped for any reason."""
        return sum(tally.count for tally in self.dropped.values())

    def measure(self, groups: Sequence[Group], roles: Callable[[Sequence[Group]], Roles] = chosen_and_rejected) -> None:
        """Count and take the lengths of the groups that are kept.

        Args:
            groups: The groups of all rows that are kept.
            roles: Sorts their completions by part.
        """
        self.kept, self.groups = len({group.row for group in groups}), len(groups)
        parts = {name: _lengths(ids) for name, ids in roles(groups).items() if ids}
        self.completions = {name: len(lengths) for name, lengths in parts.items()}
        if groups:
            prompts = _lengths([group.prompt_ids for group in groups])
            self.tokens = {name: _quantiles(lengths) for name, lengths in {"prompt": prompts, **parts}.items()}
        if len(parts) == 2:
            first, second = (lengths.double().mean() for lengths in parts.values())
            self.length_ratio = (first / second).item()

    def check(self, max_dropped: float) -> None:
        """Refuse a split that lost too much.

        Args:
            max_dropped: Largest accepted share of dropped rows, in [0, 1].

        Raises:
            DataError: If nothing was kept, or the share dropped is larger; the message lists the reasons.
        """
        reasons = "\n  ".join(_counted(self.dropped))
        if self.read == self.lost + sum(tally.count for tally in self.left_out.values()):
            everything = "\n  ".join(_counted({**self.dropped, **self.left_out}))
            raise DataError(f"{self.source}: nothing is left of {self.read} rows; dropped:\n  {everything}")
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
            for name, tallies in (("dropped", self.dropped), ("left_out", self.left_out), ("noted", self.noted))
        }
        counts = {"source": self.source, "read": self.read, "kept": self.kept, "held_out": self.held_out}
        made = {"groups": self.groups, "completions": self.completions}
        return {**counts, **made, **tallies, "tokens": self.tokens, "length_ratio": self.length_ratio}

    def render(self, name: str, columns: Sequence[str]) -> list[str]:
        """The lines of the table about this split.

        Args:
            name: Of the split.
            columns: The keys of ``tokens`` to show; "-" where there is none.
        """
        known = {key: f"{x['median']:g}/{x['p99']:g}/{x['max']:g}" for key, x in self.tokens.items()}
        spans = "  ".join(known.get(column, "-") for column in columns)
        ratio = "" if self.length_ratio is None else f"   {'/'.join(self.completions)} {self.length_ratio:.2f}"
        made = f", {self.groups} groups" if self.groups != self.kept else ""
        if any(count != self.groups for count in self.completions.values()):
            made += "".join(f", {count} {part}" for part, count in self.completions.items())
        held = f", {self.held_out} rows held out" if self.held_out else ""
        return [
            f"{name:<12}{self.read:>8}{self.kept:>8}{self.lost:>9}   {spans}{ratio}",
            f"  from {self.source}{held}{made}",
            *(f"  dropped, {line}" for line in _counted(self.dropped)),
            *(f"  left out, {line}" for line in _counted(self.left_out)),
            *(f"  {line}" for line in _counted(self.noted)),
        ]


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
        columns = list(dict.fromkeys(column for part in self.parts.values() for column in part.tokens))
        head = f"{'data':<12}{'read':>8}{'kept':>8}{'dropped':>9}   tokens: median/p99/max of {', '.join(columns)}"
        return "\n".join([head, *(line for name, part in self.parts.items() for line in part.render(name, columns))])


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


def _lengths(sequences: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(ids) for ids in sequences])


def _quantiles(lengths: Tensor) -> dict[str, float]:
    """Quantiles at data points (lower), so that every number is a length that occurs."""
    ordered = lengths.sort().values
    last = len(ordered) - 1
    return {name: float(ordered[int(share * last)]) for name, share in QUANTILES.items()}
