"""The commands of docs/pipeline.md, one after the other, on a few rows."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_align.__main__ import main

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "pipeline.md").read_text(), re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
SHORT = {
    "fit": ["--trainer.max_steps=1", "--data.max_rows=6", "--data.batch_size=2", "--samples.prompts=0"],
    "tools/score.py": ["--max_rows=6"],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory that has the configs, with the tool at hand."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    handler = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, handler)


def test_every_command_runs_and_finds_what_the_ones_before_it_wrote(place: Path) -> None:
    import score

    assert len(COMMANDS) == 9
    for command in COMMANDS:
        assert command[0] == "python"
        if command[1] == "-m":
            assert main([*command[3:], *SHORT[command[3]], "--trainer.accelerator=cpu"]) == 0, command
        else:
            few = ["--max_new_tokens=8"] if "--model" in command else []
            assert score.main([*command[2:], *SHORT[command[1]], *few]) == 0, command
    sampled, scored = (
        [json.loads(line) for line in Path(f"runs/pipeline/{name}.jsonl").read_text().splitlines()]
        for name in ("sampled", "scored")
    )
    assert len(sampled) == 6
    assert [row["prompt"] for row in sampled] == [row["prompt"] for row in scored]
    assert all(-1 <= reward <= 1 for row in sampled for reward in row["rewards"])
    assert [row["rewards"] for row in sampled] != [row["rewards"] for row in scored]
