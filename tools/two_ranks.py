"""Two data-parallel ranks: one dies, or one is told to stop.

    python tools/two_ranks.py dies 1      rank 1 gets SIGKILL: how long until no process of the run is left
    python tools/two_ranks.py dies 0      the same for the rank that started the other
    python tools/two_ranks.py stops 1     rank 1 gets SIGTERM: both save and end, and the resumed run is exact

Two CPU processes train as `fit --trainer.devices=2` starts them, joined by gloo. The exit code is 0 if all is as it
should be.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from killing.trial import differing, steps_logged

CONFIG = Path(__file__).parents[1] / "configs" / "eps_dpo.yaml"
OPTIONS = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=-1"]
OPTIONS += ["--trainer.log_every_n_steps=1", "--samples.prompts=0", "--data.batch_size=2", "--data.max_rows=80"]
WITHIN = 60.0
"""Seconds in which all processes must have ended after one has died."""


@dataclass
class Run:
    """A run of two ranks.

    Attributes:
        root: The process of rank 0, which starts the other.
        folder: Its run folder.
        log: What it prints.
    """

    root: subprocess.Popen[bytes]
    folder: Path
    log: Path

    def ranks(self) -> list[int]:
        """The processes, by rank."""
        path = Path(f"/proc/{self.root.pid}/task/{self.root.pid}/children")
        return [self.root.pid, *(int(child) for child in path.read_text().split())]

    def wait(self, holds: Callable[[], bool], seconds: float) -> float:
        """Wait until something holds, and say how long that took.

        Raises:
            TimeoutError: With what the run has printed.
        """
        begin = time.monotonic()
        while not holds():
            if time.monotonic() - begin > seconds:
                raise TimeoutError(f"nothing for {seconds} s; the run printed:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.1)
        return time.monotonic() - begin


def start(folder: Path, *args: str) -> Run:
    """Start ``fit``."""
    log = folder.with_suffix(".log")
    with log.open("a") as output:
        command = [sys.executable, "-m", "lit_align", "fit", *args]
        return Run(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True), folder, log)


def begin(folder: Path, steps: int) -> Run:
    """Start a run of its own."""
    return start(folder, "--config", str(CONFIG), *OPTIONS, f"--trainer.max_steps={steps}", f"--run_dir={folder}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("dies", "stops"))
    parser.add_argument("rank", type=int, choices=(0, 1))
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        return (dies if given.what == "dies" else stops)(Path(place), given.rank)


def dies(place: Path, rank: int) -> int:
    """Kill a rank once some steps are done."""
    run = begin(place / "run", 10**6)
    ranks: list[int] = []
    try:
        run.wait(lambda: steps_logged(run.folder) > 2, 600)
        ranks = run.ranks()
        os.kill(ranks[rank], signal.SIGKILL)
        seconds = run.wait(lambda: not any(alive(pid, run) for pid in ranks), WITHIN)
        print(f"rank {rank} of {len(ranks)} died; all had ended {seconds:.1f} s later")
    finally:
        if any(alive(pid, run) for pid in [run.root.pid, *ranks]):
            os.killpg(run.root.pid, signal.SIGKILL)
    return 0


def stops(place: Path, rank: int) -> int:
    """Ask one rank to stop, go on, and compare with a run that was let alone."""
    whole = begin(place / "whole", 12)
    whole.root.wait()
    run = begin(place / "run", 12)
    run.wait(lambda: steps_logged(run.folder) > 2, 600)
    os.kill(run.ranks()[rank], signal.SIGTERM)
    code, step = run.root.wait(), steps_logged(run.folder)
    resumed = start(run.folder, f"--resume={run.folder}").root.wait()
    different = differing(run.folder, whole.folder)
    print(f"rank {rank} got SIGTERM; exit code {code} after step {step}, resumed with exit code {resumed}")
    print(
        "the resumed run is that of an undisturbed one to the last bit" if not different else f"differs in {different}"
    )
    good = code == 128 + signal.SIGTERM and resumed == 0 and 0 < step < 12 and not different
    if not good:
        print(run.log.read_text()[-4000:])
    return int(not good)


def alive(pid: int, run: Run) -> bool:
    """Whether a process still runs; one that has ended and waits to be asked does not."""
    run.root.poll()
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
