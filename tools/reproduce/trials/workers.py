"""Run trials side by side, each in a fork of this process, which has imported everything once.

Importing takes longer than a short run. A fork shares what is imported, and nothing that a run does outlives it: not
its memory, not its signal handlers, not its crash. Nothing here may touch a GPU before the fork.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from lit_align.quiet import quiet_libraries, quiet_warnings
from trials.trial import Trial, start_of

Call = Callable[[list[str]], int]
"""A command line to its exit code."""


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        trial: The run.
        folder: Its run folder.
        log: What it printed.
        code: Its exit code, or minus the signal that ended it.
        seconds: Wall clock.
        cpu_seconds: Of its process.
    """

    trial: Trial
    folder: Path
    log: Path
    code: int
    seconds: float
    cpu_seconds: float

    @property
    def last_words(self) -> str:
        """The line that begins with its error, or else the last one it printed."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
        return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1]).strip()


def lit_align(args: list[str]) -> int:
    """The command line itself."""
    from lit_align.__main__ import main

    return main(args)


def import_all(config: Path) -> None:
    """Let lit_align import and parse once what every run needs; loads no model and touches no GPU."""
    quiet_libraries()
    quiet_warnings()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # or to look for a GPU is to touch it
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401

    if not torch.cuda.is_available():  # with peft comes bitsandbytes, which asks a GPU what it can do
        import peft

        assert peft
    with redirect_stdout(StringIO()), suppress(SystemExit):
        lit_align(["fit", "--config", str(config), "--print_config"])


def run_all(trials: Sequence[Trial], root: Path, workers: int, call: Call = lit_align) -> Iterator[Ended]:
    """Run trials, and yield each as it ends; leaving the loop ends those that are running.

    Args:
        trials: In the order they are begun.
        root: Their run folders and logs go below it.
        workers: How many run at a time, >= 1.
        call: Runs a command line in the child.
    """
    waiting, running = list(trials), {}
    root.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                trial = waiting.pop(0)
                running[_begin(trial, root, call)] = trial, time.monotonic()
            pid, status, usage = os.wait4(-1, 0)
            if pid in running:
                trial, begun = running.pop(pid)
                code, cpu = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
                yield Ended(trial, trial.folder(root), trial.log(root), code, time.monotonic() - begun, cpu)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGTERM)
        for pid in running:
            os.waitpid(pid, 0)


def in_child(function: Callable[[], object]) -> None:
    """Call a function in a fork, so that nothing of it, such as threads or a GPU's context, is there at the next one.

    Raises:
        RuntimeError: If it raises, after its traceback.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError("what the runs need could not be made; see above")


def _begin(trial: Trial, root: Path, call: Call) -> int:
    args = start_of(trial, trial.folder(root))
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(args, trial.log(root), call)
    return pid


def _child(args: list[str], log: Path, call: Call) -> None:
    """The child's whole life; it never returns."""
    code = 1
    try:
        sys.stdout = sys.stderr = log.open("w", buffering=1, encoding="utf-8")
        for stream in (1, 2):
            os.dup2(sys.stdout.fileno(), stream)
        code = call(args)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
