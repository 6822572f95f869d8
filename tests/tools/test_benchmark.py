"""The benchmark's smallest run, its counts against arithmetic, and its verdicts on made-up seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    sys.path.insert(0, str(TOOLS))
    import benchmark

    yield benchmark
    sys.path.remove(str(TOOLS))


def test_the_smallest_run_counts_right(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert tool.main(["--smallest", "--threads", "0", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["experiments"]
    assert row["tokens"] == [2 * (8 + 8 * 3)]
    sides = row["sides"]
    for name in ("ours", "ours, separate rows"):
        assert sides[name]["memory"] > 0
        assert sides[name]["padding"] == 0
        assert len(sides[name]["timing"]["cpu"]) == 1
    # A layer of "tiny": queries and output 64 x 64, keys and values 64 x 32, three of 64 x 160; and the shared head.
    layers, head = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160), 64 * 32000
    assert sides["limit"]["flops"] == 6 * (64 * layers + 2 * 8 * 3 * head)
    assert "ours, separate rows" in capsys.readouterr().out


def test_padding_is_what_no_token_stands_in(tool: Any, tmp_path: Path) -> None:
    """A prompt of 4 with completions of 1 and 3: a row of 8 for us; for TRL two of 7 that hold 5 and 7 tokens."""
    pytest.importorskip("trl")
    import torch
    from benchmarking.experiments import build
    from benchmarking.models import make

    from lit_align.data.collate import Group

    ids = torch.arange(3, 7, dtype=torch.int32)
    groups = [Group(0, ids, [ids[:1], ids[:3]], None)]
    model = make("tiny", tmp_path)
    assert build("ours", model).cells(groups) == (8, 8)
    assert build("ours, separate rows", model).cells(groups) == (12, 14)
    theirs = build("TRL", model)
    assert theirs.cells(groups) == (12, 14)
    assert theirs.trainer.args.gradient_checkpointing
    theirs.step(groups)


def test_both_sides_take_the_same_step(tool: Any, tmp_path: Path) -> None:
    """From one adapter, the gradient of the mean loss moves both alike; SGD shows it, Adam's first step would not."""
    pytest.importorskip("trl")
    import torch
    from benchmarking.experiments import build
    from benchmarking.models import make
    from benchmarking.work import synthetic

    model, (groups,) = make("tiny", tmp_path), synthetic(6, 4, 2, 3, 1, 32000, spread=0.5).batches
    moved = []
    for name in ("ours", "TRL", "TRL, head as on a GPU"):
        side = build(name, model)
        policy = side.pair.policy if name == "ours" else side.trainer.model
        named = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        torch.manual_seed(0)
        for parameter in named.values():
            torch.nn.init.normal_(parameter, 0, 0.05)
        if name == "ours":
            side.optimizer = torch.optim.SGD(named.values(), lr=1.0)
        else:
            side.trainer.optimizer = torch.optim.SGD(named.values(), lr=1.0)
            side.trainer.create_scheduler(num_training_steps=1000, optimizer=side.trainer.optimizer)
        before = {n: p.detach().clone() for n, p in named.items()}
        side.step(groups)
        moved.append({n: p.detach() - before[n] for n, p in named.items()})
    assert any(change.abs().max() > 1e-3 for change in moved[0].values())
    for other in moved[1:]:
        for n, change in moved[0].items():
            torch.testing.assert_close(change, other[n], atol=1e-5, rtol=2e-3)


def test_ratios_go_repeat_by_repeat_and_targets_are_judged(tool: Any) -> None:
    from benchmarking.clock import Ratio, Timing
    from benchmarking.experiments import Target
    from benchmarking.report import Result, Verdict

    assert Ratio.of([10.0, 30.0, 8.0], [1.0, 2.0, 4.0]) == Ratio(10.0, 2.0, 15.0)
    fast, slow = Result(Timing([1.0], [1.0]), 10, 0.0), Result(Timing([12.0], [5.0]), 20, 0.0)
    results = {"row": {"ours": fast, "TRL": slow}}
    speed = Target("", "row", "TRL", "ours", "time", 10, True)
    assert Verdict.of(speed, results) == Verdict(Ratio(12, 12, 12), Ratio(5, 5, 5), None, True)
    slow.timing.wall.clear()
    fast.timing.wall.clear()
    assert Verdict.of(speed, results) == Verdict(None, Ratio(5, 5, 5), None, False)
    memory = Target("", "row", "ours", "TRL", "memory", 0.4, False)
    assert Verdict.of(memory, results) == Verdict(None, None, 0.5, False)


def test_a_known_reference_is_looked_up_and_an_emptied_cache_is_not(tool: Any, tmp_path: Path) -> None:
    from benchmarking.experiments import build
    from benchmarking.models import make
    from benchmarking.work import synthetic

    model, (groups,) = make("tiny", tmp_path), synthetic(6, 4, 2, 2, 1, 32000).batches
    for name, passes in (("ours, empty cache", 2), ("ours, full cache", 1)):
        side, seen = build(name, model), []
        side.prepare(groups)
        side.pair.base.base_model.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        side.step(groups)
        assert len(seen) == passes


def test_a_name_that_is_no_table_is_refused_with_those_there_are(tool: Any) -> None:
    with pytest.raises(SystemExit, match="there are k8"):
        tool.main(["--smallest", "--only", "hhh"])
