"""Kill one of two data-parallel ranks during training, and time how long the others take to end.

    python tools/dead_rank.py --rank 1
    python tools/dead_rank.py --rank 0

Two CPU processes train as `fit --trainer.devices=2` starts them, joined by gloo. When the first steps are logged one of
them gets SIGKILL. The exit code is 0 if no process of the run is left within the time given.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "configs" / "eps_dpo.yaml"
OPTIONS = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=100"]
OPTIONS += ["--trainer.log_every_n_steps=1", "--samples.prompts=0", "--data.batch_size=4", "--data.max_rows=200"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, choices=(0, 1), default=1, help="which one dies")
    parser.add_argument("--within", type=float, default=60, help="seconds the other has to end")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder, log = Path(place) / "run", Path(place) / "log"
        command = [sys.executable, "-m", "lit_align", "fit", "--config", str(CONFIG), *OPTIONS, f"--run_dir={folder}"]
        with log.open("w") as output:
            root = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_for(lambda: logged(folder / "metrics.csv"), 300, log)
            ranks = [root.pid, *children(root.pid)]
            os.kill(ranks[given.rank], signal.SIGKILL)
            begin = time.monotonic()
            wait_for(lambda: not any(alive(pid, root) for pid in ranks), given.within, log)
            print(f"rank {given.rank} of {len(ranks)} died; all had ended {time.monotonic() - begin:.1f} s later")
        finally:
            if any(alive(pid, root) for pid in [root.pid, *children(root.pid)]):
                os.killpg(root.pid, signal.SIGKILL)
    return 0


def wait_for(holds: object, seconds: float, log: Path) -> None:
    """Wait until something holds.

    Raises:
        TimeoutError: With what the run has printed.
    """
    begin = time.monotonic()
    while not holds():  # type: ignore[operator]
        if time.monotonic() - begin > seconds:
            raise TimeoutError(f"nothing for {seconds} s; the run printed:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


def logged(path: Path) -> bool:
    """Whether some steps have been logged."""
    return path.exists() and len(path.read_text().splitlines()) > 3


def children(pid: int) -> list[int]:
    """Processes started by a process."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def alive(pid: int, root: subprocess.Popen[bytes]) -> bool:
    """Whether a process still runs; one that has ended and waits to be asked does not."""
    root.poll()
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
