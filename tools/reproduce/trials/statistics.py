"""Means over seeds with their standard errors, and the choice of hyperparameters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard error over seeds.

        sd / √n,   sd² = Σ (v - mean)² / (n - 1)

    Args:
        values: One for each seed, n >= 1.

    Returns:
        ``mean``, ``standard_error`` (None for n = 1), ``n`` and the ``values``.
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "n": len(values), "values": list(values)}


def curve(runs: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float | None]]:
    """Curves of several seeds as one, step by step.

    Args:
        runs: ``step``, the same in all, and any other series of that length.

    Returns:
        ``step``, and of each other series its mean and, under its name with " error" behind, the standard error; cut to
        the shortest run.
    """
    length = min(len(run["step"]) for run in runs)
    found: dict[str, list[float | None]] = {"step": list(runs[0]["step"][:length])}
    for name in runs[0]:
        if name != "step":
            points = [summary([run[name][i] for run in runs]) for i in range(length)]
            found[name] = [point["mean"] for point in points]
            found[f"{name} error"] = [point["standard_error"] for point in points]
    return found


def best(tried: Mapping[str, Sequence[float | None]]) -> str:
    """The settings with the largest mean of the criterion over the search seeds; of equals the first.

    Args:
        tried: Label of the settings to the criterion of each search run, None of one that failed, which rules them out.

    Raises:
        ValueError: If every one has failed.
    """
    there = {label: [value for value in values if value is not None] for label, values in tried.items()}
    whole = [label for label, values in tried.items() if values and len(there[label]) == len(values)]
    if not whole:
        raise ValueError(f"every run of the search failed: {', '.join(tried)}")
    return max(whole, key=lambda label: statistics.fmean(there[label]))


def plus_minus(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """``mean ± standard error (n)``, or a dash."""
    if value is None:
        return "–"
    error = "" if value["standard_error"] is None else f" ± {value['standard_error']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{error} ({value['n']})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
