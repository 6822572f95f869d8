"""How often the policy's samples beat the reference's, over a run, and what that curve is like."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trials.results import draws

NEAR = 0.05
"""Below its peak, where the win rate still counts as at it."""
LATE = 0.25
"""The last share of the draws."""

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


def measured(folder: Path) -> dict[str, Any]:
    """The curve of a run and its figures; of the reference, with which the curve begins, the win rate is a half."""
    told = {float(one["step"]): one for one in draws(folder)}  # the last two may be of the same step
    rewards = rewards_of(folder, told)
    steps = list(told)
    reference = rewards[steps[0]]
    curve = {"step": steps, "win": [0.5, *(win_rate(rewards[step], reference) for step in steps[1:])]}
    curve["reward"] = [statistics.fmean(map(statistics.fmean, rewards[step])) for step in steps]
    curve["kl"] = [one["kl"]["mean"] if "kl" in one else 0.0 for one in told.values()]
    curve["length"] = [one["tokens"] for one in told.values()]
    return {
        "final": {**shape(curve), **{name: curve[name][-1] for name in ("win", "reward", "kl", "length")}},
        "curve": curve,
    }


def judge(folder: Path, name: str) -> None:
    """Give the samples of a run the rewards of a source that its dataset does not bring.

    Args:
        folder: The run folder.
        name: As ``--reward`` of ``python -m lit_align evaluate``.
    """
    from lit_align.commands.rewarding import load_reward

    path = folder / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rewards = load_reward(name)([row["prompt"] for row in rows], [row["completion"] for row in rows])
    judged = [{**row, "reward": float(reward)} for row, reward in zip(rows, rewards, strict=True)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged), encoding="utf-8")


def rewards_of(folder: Path, told: Mapping[float, Any]) -> dict[float, list[list[float]]]:
    """Step to the rewards of each prompt's completions.

    Raises:
        ValueError: If a sample has no reward.
    """
    found: dict[float, list[float]] = {}
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("reward") is None:
            raise ValueError(f"a sample of step {row['step']} has no reward, so it neither wins nor loses")
        found.setdefault(float(row["step"]), []).append(row["reward"])
    groups = {}
    for step, one in told.items():
        size = one["completions"]
        groups[step] = [found[step][i * size : (i + 1) * size] for i in range(one["prompts"])]
    return groups


def shape(curve: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The win rate over a run in numbers.

    ``peak`` is the largest of all draws, ``peak at`` its step and ``kl at peak`` the KL there, ``width`` the share of
    draws that are not more than ``NEAR`` below it, ``late`` the mean of the last quarter of the draws, ``fall`` what
    that is below the peak, ``over the run`` the mean of all draws.

    Args:
        curve: ``step``, ``win`` and ``kl``; the first, of the reference, does not count.
    """
    step, win, kl = (curve[name][1:] for name in ("step", "win", "kl"))
    top = max(range(len(win)), key=win.__getitem__)
    late = statistics.fmean(win[-max(1, round(LATE * len(win))) :])
    found = {"peak": win[top], "peak at": step[top], "kl at peak": kl[top], "late": late, "fall": win[top] - late}
    near = sum(one >= win[top] - NEAR for one in win)
    return {**found, "width": near / len(win), "over the run": statistics.fmean(win)}
