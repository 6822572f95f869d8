"""Trials: one run, killed again and again and started again by the same command, held against an undisturbed one."""

from __future__ import annotations

import csv
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from killing.watched import BOARD, PHASES, Ended, run
from lit_align.checkpoint import checkpoints_in, newest_good

TIMED = ("second", "share_of_time")
"""Parts of the names of columns that tell what a clock said."""


@dataclass
class Tally:
    """What was seen.

    Attributes:
        kills: Where a run was when it was killed -> how often.
        runs: Runs that came to their end after one kill or more.
        lost: Optimizer steps that a checkpoint already held and that had to be taken again.
        redone: Optimizer steps taken again because no checkpoint held them yet.
        faults: What went wrong, in words.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    lost: int = 0
    redone: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass
class Reference:
    """An undisturbed run: its folder, how often it entered each phase, and how long an entry took."""

    folder: Path
    entries: dict[str, int]
    seconds: dict[str, float]


def undisturbed(args: Sequence[str], folder: Path, log: Path) -> Reference:
    """Run to the end.

    Raises:
        RuntimeError: If the command line does not do so by itself.
    """
    ended = run([*args, f"--run_dir={folder}", "--resume"], log)
    if ended.code:
        raise RuntimeError(f"the run ended with exit code {ended.code}; see {log}")
    entries = {name: BOARD.entered[i] for i, name in enumerate(PHASES)}
    seconds = {name: BOARD.seconds[i] / max(1, entries[name]) for i, name in enumerate(PHASES)}
    return Reference(folder, entries, seconds)


def trial(args: Sequence[str], reference: Reference, folder: Path, kills: int, tally: Tally) -> None:
    """Kill a run up to ``kills`` times, let it end, and compare.

    Args:
        args: The command line, the same each time but for ``--run_dir`` and ``--resume``, which are added.
        reference: What it must come to.
        folder: A run folder that is not there yet.
        kills: How often.
        tally: Receives what is seen.
    """
    log, command = folder.with_suffix(".log"), [*args, f"--run_dir={folder}", "--resume"]
    done = 0
    while done < kills:
        ended = run(command, log, moment(reference, tally))
        if not ended.killed:
            break
        done += 1
        tally.kills[ended.phase] += 1
        inspect(folder, ended, tally)
    else:
        ended = run(command, log)
    if ended.code:
        tally.faults.append(f"{folder.name}: exit code {ended.code}, see {log}")
    elif done:
        tally.runs += 1
        tally.faults += [
            f"{folder.name}: {what} differs from the undisturbed run" for what in differing(folder, reference.folder)
        ]
    if not tally.faults:
        shutil.rmtree(folder)


def moment(reference: Reference, tally: Tally) -> tuple[str, int, float]:
    """Somewhere in a run: the phase that was struck least so far, one of its entries, and a while within it."""
    phase = min(PHASES[1:], key=lambda name: (tally.kills[name], random.random()))
    entry = random.randint(1, max(1, reference.entries[phase]))
    return phase, entry, random.uniform(0, reference.seconds[phase])


def inspect(folder: Path, ended: Ended, tally: Tally) -> None:
    """What a kill left: every checkpoint whole, and none lost that had been made."""
    checkpoints = folder / "checkpoints"
    tally.faults += [f"{one.path}: {one.problem}" for one in checkpoints_in(checkpoints) if one.problem]
    newest = newest_good(checkpoints)
    step = 0 if newest is None else newest.step
    held = max(ended.saved, ended.begun_at, 0)
    if step < held:
        tally.lost += held - step
        tally.faults.append(
            f"{folder.name}: a checkpoint of step {held} was made, and the newest good one is of {step}"
        )
    tally.redone += max(0, steps_logged(folder) - step)


def steps_logged(folder: Path) -> int:
    """Optimizer steps that ``metrics.csv`` tells of."""
    rows = losses(folder) if (folder / "metrics.csv").exists() else []
    return max((int(row["step"]) + 1 for row in rows if (row.get("step") or "").isdigit()), default=0)


def losses(folder: Path) -> list[dict[str, str]]:
    """``metrics.csv`` without what a clock says."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k and not any(t in k for t in TIMED)} for row in csv.DictReader(file)]


def differing(one: Path, two: Path) -> list[str]:
    """Which of metrics and adapter two runs do not share to the last bit."""
    parts = {"metrics.csv": losses(one) != losses(two)}
    name = "adapter/adapter_model.safetensors"
    parts[name] = (one / name).read_bytes() != (two / name).read_bytes()
    return [part for part, differs in parts.items() if differs]


def flips(path: Path, count: int) -> int:
    """Change random bytes of a checkpoint, one at a time, and count those that are noticed.

    Args:
        path: The checkpoint; it is left as it was.
        count: How many.

    Returns:
        How many were noticed when the folder's checkpoints were read.
    """
    beside = path.parent / "flipped" / path.name
    beside.parent.mkdir()
    shutil.copy(path, beside)
    size, noticed = path.stat().st_size, 0
    for _ in range(count):
        at, change = random.randrange(size), random.randrange(1, 256)
        with beside.open("r+b") as file:
            file.seek(at)
            old = file.read(1)[0]
            file.seek(at)
            file.write(bytes([old ^ change]))
        (found,) = checkpoints_in(beside.parent)
        noticed += bool(found.problem)
        with beside.open("r+b") as file:
            file.seek(at)
            file.write(bytes([old]))
    (found,) = checkpoints_in(beside.parent)
    assert not found.problem, "undone, the file must be good again"
    shutil.rmtree(beside.parent)
    return noticed
