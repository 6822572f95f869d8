"""A disk that really is full: a small file system in memory, filled up in the middle of a run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
from lit_align.__main__ import main
from lit_align.checkpoint import checkpoints_in
from lit_align.module import AlignModule
from tests.survival.runs import arguments

filler, step, held = Path("small/filler"), AlignModule.training_step, {}

def fill():
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 256)
        except OSError:
            pass

def training_step(self, batch, batch_idx):
    taken = self.trainer.global_step
    if taken == 3:
        fill()
    held[taken] = sorted(found.step for found in checkpoints_in(Path("small/run/checkpoints")))
    if taken == 7:
        filler.unlink()
    return step(self, batch, batch_idx)

AlignModule.training_step = training_step
code = main(arguments(sys.argv[1], run_dir="small/run"))
print("held", [held[taken] for taken in (3, 4, 7, 8)], "exit", code)
"""


@pytest.fixture
def small(place: Path) -> list[str]:
    """The words before a command that give it a file system of 2 MiB in ``small``."""
    (place / "small").mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    words = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=2m none small && exec "$@"', "sh"]
    if subprocess.run([*words, "true"], cwd=place, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    return words


def test_a_run_outlives_a_full_disk_with_its_checkpoints(model: str, place: Path, small: list[str]) -> None:
    command = [*small, sys.executable, "-W", "ignore", "-c", PROGRAM, model]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    # After step 3 the disk is full: the checkpoints of steps 2 and 3 stay as they are until there is room again.
    assert "held [[2, 3], [2, 3], [2, 3], [3, 8]] exit 0" in done.stdout, done.stdout + done.stderr
    assert "THE CHECKPOINT WAS NOT SAVED" in done.stderr
    assert "metrics.csv cannot be written: No space left on device" in done.stderr
