"""What a study is going to run, and how long that takes, before it begins."""

from __future__ import annotations

import argparse
from collections import Counter

from trials.study import Study


def plan(study: Study, given: argparse.Namespace, seconds: float) -> str:
    """The runs of a study by part, and their time.

    Args:
        study: Which.
        given: The command line, from ``command.parse``.
        seconds: CPU seconds of a run as measured, for the estimate; what has been run before is not taken off.
    """
    arms = study.chosen_parts(given.parts)
    searches = sum(arm.like is None for arm in arms) * len(study.grid) * given.search_seeds
    parts = Counter(arm.part for arm in arms)
    runs = searches + len(arms) * given.seeds
    lines = [f"{study.name}: {len(arms)} arms ({', '.join(f'{part} {number}' for part, number in parts.items())})"]
    lines.append(f"  search: {searches} runs, {len(study.grid)} settings with {given.search_seeds} seed(s) each")
    lines.append(f"  report: {len(arms) * given.seeds} runs, {given.seeds} seeds of each arm")
    minutes = runs * seconds / given.workers / 60
    lines.append(f"  about {minutes:.0f} min, at {seconds:.0f} s a run of one core, {given.workers} at a time")
    return "\n".join(lines)
