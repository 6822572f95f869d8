"""Choose among the completions of one prompt by their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Select = Literal["ranked", "best_and_worst", "best", "all_pairs"]
"""Of the completions of a prompt, best first: all; two; one; every better and worse one as a group of two."""


def ranked(rewards: Sequence[float]) -> list[int]:
    """Positions of the completions, best first; equal rewards keep their order.

    Args:
        rewards: One finite reward for each completion, larger is better, (K,).
    """
    return sorted(range(len(rewards)), key=lambda number: -rewards[number])


def best(rewards: Sequence[float]) -> int:
    """Position of the best completion, the first of equals, for K >= 1 rewards (K,)."""
    return ranked(rewards)[0]


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int] | None:
    """Positions of the best and the worst completion; the first of the best, the last of the worst.

    Args:
        rewards: One finite reward for each completion, larger is better, (K,).

    Returns:
        Two positions, or None where all rewards are equal, which is no preference.
    """
    order = ranked(rewards)
    if not order or rewards[order[0]] == rewards[order[-1]]:
        return None
    return order[0], order[-1]


def at_least(rewards: Sequence[float], threshold: float) -> list[int]:
    """Positions of the completions whose reward is ``threshold`` or more, best first; equal rewards keep their order.

    Args:
        rewards: One finite reward for each completion, larger is better, (K,).
        threshold: Smallest reward that counts.
    """
    return [number for number in ranked(rewards) if rewards[number] >= threshold]


def all_pairs(rewards: Sequence[float]) -> list[tuple[int, int]]:
    """Every (better, worse) pair of positions with unequal rewards, ordered by the better one's rank, then the worse
    one's.

    Args:
        rewards: One finite reward for each completion, larger is better, (K,).
    """
    order = ranked(rewards)
    pairs = [(better, worse) for place, better in enumerate(order) for worse in order[place + 1 :]]
    return [(better, worse) for better, worse in pairs if rewards[better] > rewards[worse]]
