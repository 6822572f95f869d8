"""Reward against KL: what a run reaches at a given distance from the reference, and what several have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Path = Sequence[tuple[float, float]]
"""Points (KL, reward); the first is the reference itself, at a KL of 0."""


def at(path: Path, kl: float) -> float:
    """The reward where a path first comes as far as some KL, linear in √KL between its points.

    Near the reference a policy's reward grows like the square root of its KL: π_ref (1 + εA) gains ε var(A) for
    ε² var(A) / 2 nats. A line in KL itself would be far too low for a method that leaves the reference in large steps.

    Args:
        path: In the order of training, or of a strength that is turned up; KL may fall in between.
        kl: Nats, in [0, the largest KL of the path].

    Raises:
        ValueError: If the path does not come so far.
    """
    if path[0][0] >= kl:
        return path[0][1]
    for (near, low), (far, high) in pairwise(path):
        if near < kl <= far:
            near, there, far = (max(one, 0.0) ** 0.5 for one in (near, kl, far))
            return low + (high - low) * (there - near) / (far - near)
    raise ValueError(f"the path ends at {max(one for one, _ in path):.3g} nats, before {kl:.3g}")


def shared(paths: Sequence[Path]) -> tuple[float, float] | None:
    """From the largest KL of a first point after the reference to the largest that all paths come to, nats.

    What lies below has been measured of some paths only; None if nothing is left.
    """
    near = max(next((kl for kl, _ in path[1:] if kl > 0), math.inf) for path in paths)
    far = min(max(kl for kl, _ in path) for path in paths)
    return (near, far) if near < far else None


def height(path: Path, near: float, far: float, places: int = 8) -> float:
    """Mean reward of a path at ``places`` equally spaced KLs from ``near`` to ``far``.

    One number for a whole frontier: of two the one that lies above the other has the larger.
    """
    kls = [min(near + (far - near) * i / (places - 1), far) for i in range(places)]  # rounding may go beyond
    return sum(at(path, kl) for kl in kls) / places


def steps_of(final: Mapping[str, Any]) -> list[str]:
    """The steps at which an arm's path has been measured, in their order."""
    return sorted((name.removeprefix("kl at ") for name in final if name.startswith("kl at ")), key=float)


def paths_of(final: Mapping[str, Any], what: str = "reward") -> list[list[tuple[float, float]]]:
    """The path of each seed from what a study reports of an arm, as ``kl at STEP`` and the same of another measure."""
    kls, values = ([final[f"{name} at {step}"]["values"] for step in steps_of(final)] for name in ("kl", what))
    return [
        list(zip(*both, strict=True)) for both in zip(zip(*kls, strict=True), zip(*values, strict=True), strict=True)
    ]
