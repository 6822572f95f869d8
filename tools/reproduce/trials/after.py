"""What is asked of a run when it has ended, each time in a process of its own: an evaluation, or a function."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from trials.results import write_json
from trials.workers import in_child, lit_align


def answer(folder: Path, name: str, question: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What a function gives in a fork, where it may load models; it is left in the folder as ``NAME.json``."""
    place = folder / f"{name}.json"
    in_child(lambda: write_json(place, question()))
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def evaluation(folder: Path, name: str, options: Mapping[str, object]) -> dict[str, Any]:
    """What ``python -m lit_align evaluate`` says of a run.

    Args:
        folder: The run folder.
        name: Of its files there: ``NAME.json``, ``NAME.jsonl`` and ``NAME.log``.
        options: Of the command, without dashes.
    """
    out = folder / f"{name}.json"
    for old in (out, out.with_suffix(".jsonl")):
        old.unlink(missing_ok=True)
    given = [f"--{key}={value}" for key, value in {**options, "out": out}.items()]
    in_child(partial(command, ["evaluate", str(folder), *given], folder / f"{name}.log"))
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def command(args: list[str], log: Path, call: Callable[[list[str]], int] = lit_align) -> None:
    """Run a command line, with what it prints in a file.

    Raises:
        RuntimeError: If it fails, with the last line it printed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        code = call(args)
    if code:
        lines = log.read_text(encoding="utf-8").strip().splitlines() or ["it printed nothing"]
        raise RuntimeError(f"{' '.join(args)}: exit code {code}: {lines[-1]}; see {log}")


def standing(found: Mapping[str, Any], first: str, second: str) -> dict[str, float]:
    """How often one candidate of an evaluation beats another.

    Returns:
        ``raw`` and ``length-controlled``, without what cannot be told; nothing where there is no second candidate.
    """
    pair = next((one for one in found["comparisons"] if (one["first"], one["second"]) == (first, second)), None)
    rates = {} if pair is None else {"raw": pair["win_rate"], "length-controlled": pair["length_controlled"]}
    return {name: rate["mean"] for name, rate in rates.items() if rate is not None}
