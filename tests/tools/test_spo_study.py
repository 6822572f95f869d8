"""The study of SPO against DPO: win rates and their curve by hand, and the study from end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "tools" / "reproduce"


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """The modules of the study."""
    sys.path.insert(0, str(STUDIES))
    import spo_arms
    import spo_report
    import spo_wins
    from trials import wins

    yield SimpleNamespace(arms=spo_arms, report=spo_report, shape=spo_wins, wins=wins)
    sys.path.remove(str(STUDIES))


def test_an_answer_is_compared_with_the_other_answers_of_the_reference(tool: Any) -> None:
    """Prompt 1: 1 against 5 loses, 3 against 0 wins. Prompt 2: 2 against 2 ties, 2 against 1 wins. (1/2 + 3/4) / 2."""
    policy, reference = [[1.0, 3.0], [2.0, 2.0]], [[0.0, 5.0], [1.0, 2.0]]
    assert tool.wins.win_rate(policy, reference) == pytest.approx(0.625)
    assert tool.wins.win_rate(reference, policy) == pytest.approx(0.375)
    assert tool.wins.win_rate(reference, reference) == pytest.approx(0.5)
    assert tool.wins.win_rate([[1.0], [2.0], [0.0]], [[0.0], [2.0], [1.0]]) == pytest.approx(0.5)


def test_the_shape_of_a_curve_by_hand(tool: Any) -> None:
    """Eight draws: the peak 0.8 at step 3, 0.76 is near it and 0.74 not, and the last quarter is 0.6 and 0.5."""
    win = [0.5, 0.6, 0.76, 0.8, 0.78, 0.74, 0.7, 0.6, 0.5]
    curve = {"step": [float(i) for i in range(9)], "win": win, "kl": [float(2 * i) for i in range(9)]}
    found = tool.shape.shape(curve)
    assert (found["peak"], found["peak at"], found["kl at peak"]) == (0.8, 3.0, 6.0)
    assert found["width"] == pytest.approx(3 / 8)
    assert found["late"] == pytest.approx(0.55)
    assert found["fall"] == pytest.approx(0.25)
    assert found["over the run"] == pytest.approx(sum(win[1:]) / 8)


def test_a_run_folder_is_read_draw_by_draw(tool: Any, tmp_path: Path) -> None:
    """Two prompts of two completions; the last draw is there twice, as at the end of a run."""
    drawn = {0: [0.0, 0.0, 0.5, -0.5], 2: [1.0, -1.0, 0.5, 0.5], 4: [1.0, 1.0, 1.0, 1.0]}
    rows = [{"step": step, "reward": one} for step in (0, 2, 4, 4) for one in drawn[step]]
    draws = [{"step": step, "prompts": 2, "completions": 2, "tokens": 5.0} for step in drawn]
    for one in draws:
        one |= {"reward": {"mean": sum(drawn[one["step"]]) / 4}, "kl": {"mean": 1.0}}
    del draws[0]["kl"]
    (tmp_path / "samples.json").write_text(json.dumps({"draws": [*draws, draws[-1]]}))
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tool.shape.measured(tmp_path)
    assert found["curve"]["step"] == [0, 2, 4]
    assert found["curve"]["win"] == [0.5, pytest.approx((0.5 + 0.75) / 2), 1.0]
    assert found["curve"]["reward"] == [0.0, 0.25, 1.0]
    assert found["curve"]["kl"] == [0.0, 1.0, 1.0]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps({**row, "reward": None}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="neither wins nor loses"):
        tool.shape.measured(tmp_path)


def test_samples_without_a_reward_can_be_judged(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counting_reward.py").write_text(
        "def letters(prompts, completions):\n    return map(len, completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"step": step, "prompt": "?", "completion": "a" * step} for step in (1, 2)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tool.shape.judge(tmp_path, "counting_reward.letters")
    told = {float(step): {"prompts": 1, "completions": 1} for step in (1, 2)}
    assert tool.wins.rewards_of(tmp_path, told) == {1.0: [[1.0]], 2.0: [[2.0]]}


def test_both_methods_search_one_setting_and_all_others_take_its_rate(tool: Any) -> None:
    arms = {arm.name: arm for arm in tool.arms.arms()}
    assert len(arms) == len(tool.arms.arms())
    assert {name for name, arm in arms.items() if arm.like is None} == {tool.arms.SPO_BASE, tool.arms.DPO_BASE}
    for arm in arms.values():
        assert arm.like is None or arms[arm.like].options["model"] == arm.options["model"]
    claims = tool.report.claims()
    assert {name for claim in claims for side in claim.sides for name in side} <= set(arms)
    assert len(tool.report.SPO_GRID) == 7
    assert len(tool.report.DPO_GRID) == 4


def test_the_study_runs_from_end_to_end_and_redraws(quick_study: Callable[..., str], tmp_path: Path) -> None:
    printed = quick_study("spo", "--seeds", "1")
    assert "search: 1 runs" in printed
    found = json.loads((tmp_path / "spo.json").read_text())
    assert set(found["arms"]) == {"SPO, α 0.01, β 0.01", "DPO, β 0.1"}
    for arm in found["arms"].values():
        assert arm["curve"]["step"] == [0.0, 1.0, 2.0]
        assert arm["curve"]["win"][0] == 0.5
        assert arm["curve"]["kl"][0] == 0 < arm["curve"]["kl"][-1]
        assert all(0 <= value <= 1 for value in arm["curve"]["win"])
    assert "SPO's peak is above DPO's" in printed
    assert (tmp_path / "spo_win_step.png").stat().st_size > 1000
