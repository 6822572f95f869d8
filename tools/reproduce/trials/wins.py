"""How often the policy's samples beat the reference's, draw by draw of a run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trials.results import all_samples, draws

Rewards = Sequence[Sequence[float]]
"""Of each prompt, of each of its completions."""


def win_rate(policy: Rewards, reference: Rewards) -> float:
    """Share of comparisons that the policy wins, a tie counting half, averaged over prompts.

    The k-th completions of a prompt are drawn with the same random numbers in every draw of a run, so an answer is
    compared with the others of the reference, which are independent of it; with a single one, with that.

    Args:
        policy: N prompts with K rewards each.
        reference: The same.
    """
    shares = []
    for ours, theirs in zip(policy, reference, strict=True):
        pairs = [(a, b) for i, a in enumerate(ours) for j, b in enumerate(theirs) if i != j or len(theirs) == 1]
        shares.append(statistics.fmean((a > b) + (a == b) / 2 for a, b in pairs))
    return statistics.fmean(shares)


def win_curve(folder: Path) -> dict[str, list[float]]:
    """What the samples of a run say at each draw, the reference first, whose win rate is a half.

    Args:
        folder: The run folder; its samples have rewards.

    Returns:
        ``step``, ``win``, ``reward``, ``kl`` in nats and ``length`` in tokens.
    """
    told = draws(folder)
    rewards = rewards_of(folder, told)
    steps = list(told)
    reference = rewards[steps[0]]
    curve = {"step": steps, "win": [0.5, *(win_rate(rewards[step], reference) for step in steps[1:])]}
    curve["reward"] = [statistics.fmean(map(statistics.fmean, rewards[step])) for step in steps]
    curve["kl"] = [one["kl"]["mean"] for one in told.values()]
    curve["length"] = [one["tokens"] for one in told.values()]
    return curve


def rewards_of(folder: Path, told: Mapping[float, Any]) -> dict[float, list[list[float]]]:
    """Step to the rewards of each prompt's completions.

    Raises:
        ValueError: If a sample has no reward.
    """
    found: dict[float, list[float]] = {}
    for row in all_samples(folder):
        if row.get("reward") is None:
            raise ValueError(f"a sample of step {row['step']} has no reward, so it neither wins nor loses")
        found.setdefault(float(row["step"]), []).append(row["reward"])
    groups = {}
    for step, one in told.items():
        size = one["completions"]
        groups[step] = [found[step][i * size : (i + 1) * size] for i in range(one["prompts"])]
    return groups
