"""A small version of ``tools/kill_test.py``: real kills, real restarts, and flipped bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.survival.runs import ROOT


def test_killed_runs_end_as_undisturbed_ones_and_every_flipped_byte_is_noticed(model: str, place: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "kill_test.py"), "--kills", "2", "--kills_per_run", "2"]
    command += ["--flips", "100", "--configs", "eps_dpo", "--out", "out"]
    command += ["--options", f"--model.pair.model={model}", "--data.dataset=pairs.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(Path("out/result.json").read_text())
    assert result["kills"] == sum(result["where"].values()) == 2
    assert result["runs ended as undisturbed"] >= 1
    assert result["steps lost that a checkpoint held"] == 0
    assert result["bytes changed"] == result["changes noticed"] == 100
    assert result["faults"] == []
