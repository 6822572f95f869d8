"""Results of runs in one JSON file, written whole after each, so that a study goes on where it was."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FLAT = re.compile(r"\[[^\[\]{}\"]*\]")
"""A list of numbers, which goes on one line."""


class Results:
    """What each run has given, by its key.

    Args:
        path: The JSON file; what it holds is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def __getitem__(self, key: str) -> Any:
        return self.found[key]

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep the result of a run, on disk before this returns."""
        self.found[key] = result
        write_json(self.path, self.found)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one move; numbers are kept to five digits, which is more than any of them is good for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        text = json.dumps(_short(value), indent=1, ensure_ascii=False)
        file.write(_FLAT.sub(lambda numbers: " ".join(numbers[0].split()), text) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def series(folder: Path, columns: Mapping[str, str]) -> dict[str, list[float]]:
    """Columns of a run's ``metrics.csv``, in the rows that have all of them.

    Args:
        folder: The run folder.
        columns: Our names to those of the columns.

    Returns:
        Each of our names, and ``step``, optimizer steps counted from 1, to as many numbers.
    """
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row.get(name) for name in columns.values())]
    found = {name: [float(row[column]) for row in rows] for name, column in columns.items()}
    return {"step": [int(row["step"]) + 1.0 for row in rows], **found}


def draws(folder: Path) -> dict[float, dict[str, Any]]:
    """The summaries of a run's samples by step, the first from the reference, whose KL to itself is 0."""
    found = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["draws"]
    return {float(one["step"]): {"kl": {"mean": 0.0}, **one} for one in found}  # the last two may be of the same step


def samples(folder: Path) -> list[dict[str, Any]]:
    """The completions that a run drew last, one record each."""
    rows = all_samples(folder)
    last = max(row["step"] for row in rows)
    return [row for row in rows if row["step"] == last]


def all_samples(folder: Path) -> list[dict[str, Any]]:
    """The completions of all draws of a run, one record each, in order."""
    with (folder / "samples.jsonl").open(encoding="utf-8") as file:  # str.splitlines would cut at signs within a text
        return [json.loads(line) for line in file]


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {str(key): _short(one) for key, one in value.items()}
    return [_short(one) for one in value] if isinstance(value, list | tuple) else value
