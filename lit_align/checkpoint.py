"""Checkpoints of a run: written whole or not at all, hashed, never pickled; and the newest good one among several."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from lit_align.errors import UserError
from lit_align.statefile import PART, BadState, read_state, sync_folder, write_state

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""The newest checkpoint of a run and the one before it, in ``RUN_DIR/checkpoints``."""
ENDED = "ended"
"""Key that tells the checkpoint of a run's end, after which nothing is left to do, from those on the way."""


class SafeCheckpointIO(CheckpointIO):
    """Reads and writes single files of ``statefile``; a Lightning plugin, so every checkpoint callback uses it.

    A disk that is full or fails costs the checkpoint, not the run: a warning, the older files stay, also those that a
    callback then asks to have removed. Ranks other than the first never write.
    """

    def __init__(self) -> None:
        self.failed = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, or warn that the disk refused it.

        Raises:
            UserError: If some callback's state holds what a file cannot.
        """
        try:
            write_state(Path(path), checkpoint)
        except OSError as error:
            self.failed = True
            log.warning(
                "THE CHECKPOINT WAS NOT SAVED: %s: %s. Training goes on, and the older checkpoints are untouched; "
                "free some space before the next one is due",
                path,
                error.strerror or error,
            )
        except TypeError as error:
            raise UserError(f"a checkpoint cannot be made: {error}") from error
        else:
            self.failed = False

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; tensors are on the CPU whatever ``map_location`` says, and nothing is ever unpickled.

        Raises:
            UserError: If it is missing, damaged or not ours, with the newest good one beside it.
        """
        path = Path(path)
        try:
            found: dict[str, Any] = read_state(path)
        except (BadState, OSError) as error:
            good = [one for one in checkpoints_in(path.parent) if one.path != path and not one.problem]
            hint = f"; {max(good, key=order).path} is the newest good one beside it" if good else ""
            raise UserError(f"the checkpoint {path} cannot be used: {reason(error)}{hint}") from error
        return found

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, unless the last one could not be written."""
        if not self.failed:
            Path(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Found:
    """A checkpoint file and where its run stood.

    Attributes:
        path: The file.
        step: Optimizer steps taken.
        epochs: Epochs completed.
        ended: Whether the run had come to its end, with the adapter saved.
        problem: Why it cannot be used; empty for a good one.
    """

    path: Path
    step: int = -1
    epochs: int = 0
    ended: bool = False
    problem: str = ""


def checkpoints_in(folder: Path) -> Iterator[Found]:
    """Every checkpoint of a folder that a run can go on from, each read and checked in full; and every bad one."""
    for path in sorted(folder.glob("*.ckpt")):
        try:
            state = read_state(path)
        except (BadState, OSError) as error:
            yield Found(path, problem=reason(error))
        else:
            if "optimizer_states" in state:
                yield Found(path, state["global_step"], _epochs(state["loops"]["fit_loop"]), state.get(ENDED, False))


def _epochs(loop: dict[str, Any]) -> int:
    """Epochs completed, also where Lightning has not yet counted the one whose last batch is done."""
    done: int = loop["epoch_progress"]["current"]["completed"]
    return done + loop["epoch_loop.batch_progress"]["is_last_batch"]


def newest_good(folder: Path) -> Found | None:
    """The checkpoint to go on from; each bad one is warned of by name.

    Args:
        folder: Where the checkpoints of a run are.

    Returns:
        The one of the most steps that is whole; None if there is none.
    """
    found = list(checkpoints_in(folder))
    good = [one for one in found if not one.problem]
    best = max(good, key=order, default=None)
    instead = "the run begins anew" if best is None else f"going on from {best.path.name}, after step {best.step}"
    for bad in (one for one in found if one.problem):
        log.warning("BAD CHECKPOINT %s: %s; %s", bad.path, bad.problem, instead)
    return best


def order(found: Found) -> tuple[int, bool, bool]:
    """What makes one good checkpoint newer than another: its steps, then its place."""
    return found.step, found.ended, found.path.name == LAST


def advance(fresh: Path, folder: Path, keep_previous: bool) -> None:
    """Make a freshly written file the newest checkpoint, and keep the one before it.

    At every moment ``last.ckpt`` is there and whole, once there has been one.

    Args:
        fresh: The file, in ``folder``.
        folder: Where the checkpoints are.
        keep_previous: False where ``last.ckpt`` is of the same step and is only replaced.
    """
    last = folder / LAST
    if keep_previous and last.exists():
        beside = folder / f".{PREVIOUS}{PART}"
        beside.unlink(missing_ok=True)
        try:
            os.link(last, beside)
        except OSError:  # a file system without hard links; the previous one is whole while the last is missing
            beside = last
        os.replace(beside, folder / PREVIOUS)
    os.replace(fresh, last)
    sync_folder(folder)


def mark_ended(last: Path, step: int, fresh: Path) -> None:
    """Write the newest checkpoint again as that of the run's end, if it is of that step; a disk may refuse it.

    Args:
        last: The newest checkpoint.
        step: Optimizer steps that the run took.
        fresh: Where to write.
    """
    if not last.exists():
        return
    try:
        state = read_state(last)
        if state["global_step"] == step and not state.get(ENDED, False):
            write_state(fresh, {**state, ENDED: True})
    except (OSError, BadState) as error:
        log.warning("that the run has ended is not noted in %s: %s", last, reason(error))


def sweep(folder: Path) -> None:
    """Delete what a killed run left half-written."""
    for path in folder.glob(f".*{PART}"):
        path.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """What is wrong with a file, without its name."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
