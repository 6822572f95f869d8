"""The search of a study, written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trials.statistics import table


def search_table(search: Mapping[str, Any], criterion: str, prefix: str = "", digits: int = 3) -> str:
    """The criterion of every learning rate that was tried for every arm, the chosen one in bold; Markdown.

    Args:
        search: Of a study's report.
        criterion: What was made large, in words.
        prefix: Of the names of the arms that are shown, such as "R1 ".
        digits: Behind the point.
    """
    there = {name: one for name, one in search.items() if name.startswith(prefix)}
    if not there:
        return ""
    labels = list(next(iter(there.values()))["tried"])
    rows = [
        [name.removeprefix(prefix), *(_tried(one, label, digits) for label in labels)] for name, one in there.items()
    ]
    title = f"{prefix}{criterion} in the search by learning rate, on seeds not reported; the chosen one in bold"
    return f"{title}\n\n{table(['', *(label.removeprefix('learning rate ') for label in labels)], rows)}"


def _tried(one: Mapping[str, Any], label: str, digits: int) -> str:
    """The mean criterion of an arm under a setting, bold if the search chose it; "failed" if a run of it did."""
    values: Sequence[float | None] = one["tried"].get(label, [])
    there = [value for value in values if value is not None]
    if len(there) < len(values) or not there:
        return "failed"
    text = f"{sum(there) / len(there):.{digits}f}"
    return f"**{text}**" if label == one["chosen"] else text
