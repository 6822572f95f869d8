"""The tool that times generation: it runs, both ways do the same work where none ends, and it counts what is kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    sys.path.insert(0, str(TOOLS))
    import benchmark_generation

    yield benchmark_generation
    sys.path.remove(str(TOOLS))


def test_it_writes_rates_of_both_ways(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    options = ["--prompts", "2", "--completions", "3", "--tokens", "5", "--repeats", "2"]
    assert tool.main([*options, "--threads", str(torch.get_num_threads()), "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["settings"]["completions"] == 3
    full, ending = written["results"]["of full length"], written["results"]["that end"]
    assert full["lit_align"]["tokens"] == full["transformers"]["tokens"] == 2 * 3 * 5
    for result in (full, ending):
        rate = result["tokens_per_second"]
        assert rate["quartiles"][0] <= rate["ratio"] <= rate["quartiles"][1]
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1


def test_tokens_are_kept_up_to_the_end_and_with_it(tool: Any) -> None:
    ids = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8], [2, 9, 2, 9]])
    assert tool.kept(ids, [2]) == 2 + 4 + 1
    assert tool.kept(ids, [2, 7]) == 2 + 3 + 1
    assert tool.kept(ids, []) == 12


def test_ratios_are_those_of_runs_side_by_side(tool: Any) -> None:
    """The machine halves its speed in the second turn: both ways halve theirs, and the ratio stays 3."""
    found = {
        "lit_align": [tool.Timing(600, 2.0, 2.0), tool.Timing(600, 4.0, 4.0)],
        "transformers": [tool.Timing(600, 6.0, 6.0), tool.Timing(600, 12.0, 12.0)],
    }
    rate = tool.summary(found)["tokens_per_second"]
    assert rate["ratio"] == pytest.approx(3)
    assert rate["quartiles"] == pytest.approx([3, 3])
    assert rate["lit_align"] == pytest.approx(225)


def test_too_few_prompts_are_refused(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--prompts", "100000"]) == 2
    assert "distinct prompts" in capsys.readouterr().err
