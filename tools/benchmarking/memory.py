"""Peak memory of a side's step, in a process of its own.

python -m benchmarking.memory SIDE MODEL GROUPS      prints the bytes beyond those held after loading
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarking.experiments import build
from lit_align.data.collate import Group

TOOLS = Path(__file__).parents[1]


def peak(side: str, model: str, groups: Sequence[Group], folder: Path) -> int:
    """Bytes a step takes beyond what is held after loading.

    Args:
        side: A key of ``experiments.SIDES``.
        model: Folder of the model.
        groups: The batch.
        folder: For the file that hands the batch over.

    Raises:
        RuntimeError: If the process fails, with what it said.
    """
    path = folder / "groups.pickle"
    path.write_bytes(pickle.dumps(list(groups)))
    command = [sys.executable, "-m", "benchmarking.memory", side, model, str(path)]
    places = [str(TOOLS), str(TOOLS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {side!r} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def most_resident() -> int:
    """The most bytes of this process that were in memory, since it began or since ``forget_peak``. Linux.

    ``getrusage`` would give the peak of the process that started this one, if that is larger.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_peak() -> None:
    """Begin to watch anew; loading may take more than a step does."""
    Path("/proc/self/clear_refs").write_text("5")


def main(arguments: Sequence[str]) -> None:
    """Load, take a step on one group for what is made at first use, then the step that counts."""
    side, model, path = arguments
    groups = pickle.loads(Path(path).read_bytes())
    found = build(side, model)
    held = resident()
    forget_peak()
    for part in (groups[:1], groups):
        found.prepare(part)
        found.step(part)
    print(most_resident() - held)


if __name__ == "__main__":
    main(sys.argv[1:])
