"""What the win rate over a run is like."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trials.results import all_samples
from trials.wins import win_curve

NEAR = 0.05
"""Below its peak, where the win rate still counts as at it."""
LATE = 0.25
"""The last share of the draws."""


def measured(folder: Path) -> dict[str, Any]:
    """The curve of a run and its figures."""
    curve = win_curve(folder)
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

    path, rows = folder / "samples.jsonl", all_samples(folder)
    rewards = load_reward(name)([row["prompt"] for row in rows], [row["completion"] for row in rows])
    judged = [{**row, "reward": float(reward)} for row, reward in zip(rows, rewards, strict=True)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged), encoding="utf-8")


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
