"""What is read off a run of the length tasks: true reward, length, KL and the learned reward, draw by draw."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trials.results import all_samples, draws

SHARE = 0.5
"""Of the way from the reference to the optimum, where its speed is read."""


@dataclass(frozen=True)
class LengthReward:
    """The true reward, ``lit_align.rewards.Length``, from the lengths that a run has written down.

    Attributes:
        target: The best length in tokens; None wants the shortest.
    """

    target: int | None

    def of(self, tokens: float) -> float:
        """The reward of one completion, end of sequence included."""
        return -tokens if self.target is None else -abs(tokens - self.target)

    @property
    def optimum(self) -> float:
        """The largest there is; the shortest completion is the end of sequence alone."""
        return -1.0 if self.target is None else 0.0


def measured(folder: Path, reward: LengthReward, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The curve of a run on the grid of its draws, and its figures.

    A run ends early where its completions have no longer rewards that differ; what follows is as it was then.

    Args:
        folder: The run folder.
        reward: The true one.
        facts: ``steps`` and ``every`` of the run, and of a fresh one its ``updates`` on a ``buffer``, and a ``few``
            completions after which it is looked at.
    """
    lengths: dict[float, list[int]] = {}
    for row in all_samples(folder):
        lengths.setdefault(float(row["step"]), []).append(row["tokens"])
    told = draws(folder)
    for step, one in told.items():
        lengths[step] = lengths[step][: one["prompts"] * one["completions"]]
    grid = [float(step) for step in (*range(0, facts["steps"], facts["every"]), facts["steps"])]
    latest = [max(step for step in told if step <= at) for at in grid]
    curve: dict[str, list[float]] = {"step": grid}
    curve["gold"] = [statistics.fmean(map(reward.of, lengths[step])) for step in latest]
    curve["length"] = [statistics.fmean(lengths[step]) for step in latest]
    curve["kl"] = [told[step]["kl"]["mean"] for step in latest]
    curve["proxy"] = [told[step]["reward"]["mean"] for step in latest]
    if facts["fresh"]:
        curve["drawn"] = [-(-step // facts["updates"]) * facts["buffer"] for step in grid]
    final = figures_of(curve, reward.optimum)
    if facts["fresh"]:
        seen = [i for i, drawn in enumerate(curve["drawn"]) if drawn <= facts["few"]]
        final["gold of few draws"] = curve["gold"][seen[-1]]
    return {"final": final, "curve": curve}


def figures_of(curve: Mapping[str, Sequence[float]], optimum: float) -> dict[str, float]:
    """A run in numbers.

    ``half`` is the update at which half of the way to the optimum is behind it, between two draws by a straight line,
    and the last one where that never was so; ``kl at half`` the KL there.

    Args:
        curve: ``step``, ``gold``, ``length``, ``kl`` and ``proxy``, beginning with the reference.
        optimum: The largest true reward.
    """
    step, gold, kl = curve["step"], curve["gold"], curve["kl"]
    final = {name: curve[name][-1] for name in ("gold", "length", "kl", "proxy")}
    final["gold over the run"] = statistics.fmean(gold[1:])
    final["gain"] = gold[-1] - gold[0]
    level = gold[0] + SHARE * (optimum - gold[0])
    final["half"], final["kl at half"] = step[-1], kl[-1]
    for i in range(1, len(step)):
        if gold[i] >= level > gold[i - 1]:
            part = (level - gold[i - 1]) / (gold[i] - gold[i - 1])
            final["half"] = step[i - 1] + part * (step[i] - step[i - 1])
            final["kl at half"] = kl[i - 1] + part * (kl[i] - kl[i - 1])
            break
    return final
