"""Reward against KL: what a run reaches at a given distance from the reference, and what several have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

Path = Sequence[tuple[float, float]]
"""Points (KL, reward); the first is the reference itself, at a KL of 0."""


def at(path: Path, kl: float) -> float:
    """The reward where a path first comes as far as some KL, linear between its points.

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
            return low + (high - low) * (kl - near) / (far - near)
    raise ValueError(f"the path ends at {max(one for one, _ in path):.3g} nats, before {kl:.3g}")


def common(paths: Sequence[Path]) -> float:
    """The largest KL that all paths come to, nats."""
    return min(max(kl for kl, _ in path) for path in paths)


def height(path: Path, kl: float, places: int = 8) -> float:
    """Mean reward of a path at ``places`` equally spaced KLs up to and with ``kl``, none at 0.

    One number for a whole frontier: of two with the same start the one that lies above the other has the larger.
    """
    return sum(at(path, kl * (i + 1) / places) for i in range(places)) / places


def paths_of(
    final: Mapping[str, Mapping[str, Sequence[float]]], steps: Sequence[int]
) -> list[list[tuple[float, float]]]:
    """The path of each seed from what a study reports of an arm, as ``kl at STEP`` and ``reward at STEP``."""
    kls, rewards = ([final[f"{name} at {step}"]["values"] for step in steps] for name in ("kl", "reward"))
    return [
        list(zip(*both, strict=True)) for both in zip(zip(*kls, strict=True), zip(*rewards, strict=True), strict=True)
    ]
