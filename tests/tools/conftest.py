"""What the tests of the studies share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick_study(tmp_path: Path) -> Callable[..., str]:
    """Runs a study by its command line with ``--quick``, its results in ``tmp_path``; gives what it printed."""

    def run(name: str, *options: str) -> str:
        script = ROOT / "tools" / "reproduce" / f"{name}.py"
        command = [sys.executable, str(script), "--quick", *options, "--out", str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
