"""Claims that a study is to decide, by one rule that is stated before it runs.

A claim is about a difference of two means, each with its standard error over n seeds,

    d = mean of one side - mean of the other,   error = √(error² of one + error² of the other)

and d counts as more than a margin only where it is so by two standard errors. The seeds of two arms are taken as
independent, which is on the safe side where they share their data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trials.statistics import plus_minus, summary, table

ERRORS = 2.0
"""Standard errors by which a difference must differ from its margin."""

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "cannot tell", "not run"


@dataclass(frozen=True)
class More:
    """One side has more of a measure than the other, by more than a margin.

        holds where d - margin > 2 errors; does not where d - margin < -2 errors

    Attributes:
        text: What is claimed.
        measure: A name in the arms' "final", or "seconds" or "cpu_seconds".
        more: The arms of the side that is claimed to have more, averaged seed by seed.
        less: Those of the other.
        margin: What it must have more, in the measure's unit.
    """

    text: str
    measure: str
    more: Sequence[str]
    less: Sequence[str]
    margin: float = 0.0

    @property
    def sides(self) -> tuple[Sequence[str], Sequence[str]]:
        """The two sides in the order they are subtracted."""
        return self.more, self.less

    def verdict(self, difference: float, error: float) -> str:
        """By the rule."""
        return _beyond(difference - self.margin, error)


@dataclass(frozen=True)
class Alike:
    """Two sides differ by less than a margin, which two equal means alone do not show.

        holds where |d| + 2 errors < margin; does not where |d| - 2 errors > margin

    Attributes:
        text: What is claimed.
        measure: A name in the arms' "final", or "seconds" or "cpu_seconds".
        one: The arms of one side, averaged seed by seed.
        other: Those of the other.
        margin: A difference that is too small to matter, > 0, in the measure's unit.
    """

    text: str
    measure: str
    one: Sequence[str]
    other: Sequence[str]
    margin: float

    @property
    def sides(self) -> tuple[Sequence[str], Sequence[str]]:
        """The two sides in the order they are subtracted."""
        return self.one, self.other

    def verdict(self, difference: float, error: float) -> str:
        """By the rule."""
        return _beyond(self.margin - abs(difference), error)


@dataclass(frozen=True)
class Undecided:
    """What the runs have nothing to say about, though they have been made.

    Attributes:
        text: What is claimed, and why it cannot be told.
        measure: What it is about.
    """

    text: str
    measure: str

    @property
    def sides(self) -> tuple[Sequence[str], Sequence[str]]:
        """None."""
        return (), ()


Claim = More | Alike | Undecided


def decided(claim: Claim, arms: Mapping[str, Any]) -> dict[str, Any]:
    """What the runs say of a claim.

    Args:
        claim: What is claimed.
        arms: Of a study's report: name to "final" and the clocks.

    Returns:
        ``text``, ``measure``, ``verdict``, and where both sides have been run their summaries ``one`` and ``other``,
        the ``difference`` and its ``error``, None where a side has a single seed.
    """
    found = {"text": claim.text, "measure": claim.measure}
    if isinstance(claim, Undecided):
        return {**found, "verdict": OPEN}
    one, other = (_side(names, claim.measure, arms) for names in claim.sides)
    if one is None or other is None:
        return {**found, "verdict": MISSING}
    found |= {"one": one, "other": other, "difference": one["mean"] - other["mean"], "error": None}
    errors = [side["standard_error"] for side in (one, other)]
    if None in errors:
        return {**found, "verdict": OPEN}
    found["error"] = math.hypot(*errors)
    return {**found, "verdict": claim.verdict(found["difference"], found["error"])}


HEAD = ("claim", "measure", "one side (n)", "other side (n)", "difference ± error", "verdict")
"""Of a table of claims."""


def claim_row(one: Mapping[str, Any], digits: int = 3) -> list[str]:
    """What was ``decided`` of a claim, with the figures it rests on; dashes where there are none."""
    if "one" not in one:
        return [one["text"], one["measure"], "–", "–", "–", f"**{one['verdict']}**"]
    spread = "" if one["error"] is None else f" ± {one['error']:.{digits}f}"
    sides = [plus_minus(one[side], digits) for side in ("one", "other")]
    return [one["text"], one["measure"], *sides, f"{one['difference']:+.{digits}f}{spread}", f"**{one['verdict']}**"]


def claims_table(claims: Sequence[Claim], arms: Mapping[str, Any], digits: int = 3) -> str:
    """All claims as Markdown; those not run are counted below."""
    all_of_them = [decided(claim, arms) for claim in claims]
    run = [one for one in all_of_them if one["verdict"] != MISSING]
    text, missing = table(HEAD, [claim_row(one, digits) for one in run]), len(all_of_them) - len(run)
    return text + (f"\n\nFor {missing} of {len(claims)} claims an arm has not been run." if missing else "")


def _beyond(excess: float, error: float) -> str:
    if excess > ERRORS * error:
        return HOLDS
    return FAILS if excess < -ERRORS * error else OPEN


def _side(names: Sequence[str], measure: str, arms: Mapping[str, Any]) -> dict[str, Any] | None:
    """A measure over seeds, of several arms their mean seed by seed; None unless all of them have been run."""
    clocks = ("seconds", "cpu_seconds")
    runs = []
    for name in names:
        arm = arms.get(name, {})
        found = arm.get(measure) if measure in clocks else arm.get("final", {}).get(measure)
        if found is None:
            return None
        runs.append(found["values"])
    return summary([math.fsum(values) / len(values) for values in zip(*runs, strict=False)])
