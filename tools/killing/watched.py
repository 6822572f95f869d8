"""Runs of the real command line in forked processes, whose place in the training loop the parent can see.

Importing Lightning takes longer than a short run, so the parent imports everything once and forks: each child enters
``lit_align.__main__.main`` with an ordinary command line. Around the forward pass, the backward pass, the optimizer
step and the saving of a checkpoint it notes in shared memory where it is, and does nothing else that is not its own.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import Strategy

from lit_align.__main__ import main
from lit_align.callbacks.checkpoints import Checkpoints
from lit_align.module import AlignModule

PHASES = ("elsewhere", "forward", "backward", "step", "save")
"""Where a run can be; "elsewhere" is loading, collating, logging, validating and writing the results."""
POLL = 2e-4
"""Seconds between two looks at a child."""


class Board(ctypes.Structure):
    """What a child tells its parent."""

    _fields_ = [
        ("phase", ctypes.c_int),
        ("entered", ctypes.c_int * len(PHASES)),
        ("seconds", ctypes.c_double * len(PHASES)),
        ("begun_at", ctypes.c_int),
        ("saved", ctypes.c_int),
    ]


BOARD = multiprocessing.RawValue(Board)


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        killed: Whether the parent killed it; otherwise it came to its end by itself.
        code: Its exit code, where it was not killed.
        phase: Where it was.
        begun_at: Optimizer steps it went on from; -1 if it did not get to train.
        saved: Optimizer steps in the last checkpoint it was done with; -1 if there was none.
    """

    killed: bool
    code: int
    phase: str
    begun_at: int
    saved: int


def instrument() -> None:
    """Let this process and its children note where they are."""

    def phase(owner: Any, method: str, name: str) -> None:
        wrapped = getattr(owner, method)

        @functools.wraps(wrapped)
        def noted(*args: Any, **kwargs: Any) -> Any:
            before, begin = BOARD.phase, time.perf_counter()
            enter(PHASES.index(name))
            try:
                return wrapped(*args, **kwargs)
            finally:
                BOARD.seconds[PHASES.index(name)] += time.perf_counter() - begin
                BOARD.phase = before

        setattr(owner, method, noted)

    phase(AlignModule, "training_step", "forward")
    phase(Strategy, "backward", "backward")
    phase(Checkpoints, "save", "save")
    after(AlignModule, "on_before_optimizer_step", lambda *_: begin_step())
    after(AlignModule, "optimizer_step", lambda *_: end_step())
    after(Checkpoints, "on_train_start", lambda _, trainer, *__: note(begun_at=trainer.global_step))
    after(Checkpoints, "save", lambda _, trainer: note(saved=trainer.global_step))


def enter(phase: int) -> None:
    """Note that a phase begins."""
    BOARD.phase = phase
    BOARD.entered[phase] += 1


_step_begun = 0.0


def begin_step() -> None:
    """The gradient is complete."""
    global _step_begun
    _step_begun = time.perf_counter()
    enter(PHASES.index("step"))


def end_step() -> None:
    """The weights have moved."""
    BOARD.seconds[PHASES.index("step")] += time.perf_counter() - _step_begun
    BOARD.phase = 0


def note(**values: int) -> None:
    """Note some numbers."""
    for name, value in values.items():
        setattr(BOARD, name, value)


def after(owner: Any, method: str, what: Callable[..., None]) -> None:
    """Do something after each call of a method, with its arguments."""
    wrapped = getattr(owner, method)

    @functools.wraps(wrapped)
    def noted(*args: Any, **kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        what(*args)
        return result

    setattr(owner, method, noted)


def run(args: Sequence[str], log: Path, kill: tuple[str, int, float] | None = None) -> Ended:
    """Run a command line in a fork of this process.

    Args:
        args: The command line.
        log: File that its output is added to.
        kill: Phase, number of its entry from 1, and seconds after that entry, when the child gets SIGKILL.
    """
    ctypes.memset(ctypes.byref(BOARD), 0, ctypes.sizeof(BOARD))
    note(begun_at=-1, saved=-1)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _child(args, log)
    killed, status = False, None
    while status is None:
        done, found = os.waitpid(pid, os.WNOHANG)
        if done:
            status = found
        elif killed or kill is None or BOARD.entered[PHASES.index(kill[0])] < kill[1]:
            time.sleep(POLL)
        else:
            begin = time.perf_counter()
            while time.perf_counter() - begin < kill[2]:  # finer than sleep
                pass
            os.kill(pid, signal.SIGKILL)
            killed = True
    killed = os.WIFSIGNALED(status)
    code = 0 if killed else os.waitstatus_to_exitcode(status)
    return Ended(killed, code, PHASES[BOARD.phase], BOARD.begun_at, BOARD.saved)


def _child(args: Sequence[str], log: Path) -> None:
    """The child's whole life; it never returns."""
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        random.seed()
        code = main(list(args))
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
