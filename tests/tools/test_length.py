"""The study of the length tasks: what it reads off a run, by hand, and the study from end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lit_align.batch import CompletionBatch
from lit_align.rewards import Length

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "tools" / "reproduce"


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """The modules of the study."""
    sys.path.insert(0, str(STUDIES))
    import length
    import length_arms
    import length_curves
    import length_report

    parts = {"arms": length_arms, "curves": length_curves, "report": length_report}
    yield SimpleNamespace(study=length, **parts)
    sys.path.remove(str(STUDIES))


@pytest.mark.parametrize("target", [None, 3])
def test_the_true_reward_is_that_of_lit_align(tool: Any, target: int | None) -> None:
    lengths = [1, 3, 6]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    there = torch.ones(1, 3, dtype=torch.bool)
    ids = torch.zeros(1, 3, 6, dtype=torch.int64)
    batch = CompletionBatch(ids[:, 0, :1], there[:, :1], ids, mask[None], None, there, torch.zeros(1))
    expected = Length(target).on_tokens(batch, None)[0].tolist()
    reward = tool.curves.LengthReward(target)
    assert [reward.of(tokens) for tokens in lengths] == expected
    assert reward.optimum >= max(expected)
    assert reward.of(1 if target is None else target) == reward.optimum


def test_half_way_by_hand(tool: Any) -> None:
    """From -21 to -1 half way is -11: between -15 at 2 and -5 at 4, at 2.8; the KL there 1 + 0.4 · 2."""
    curve = {"step": [0.0, 2.0, 4.0], "gold": [-21.0, -15.0, -5.0], "kl": [0.0, 1.0, 3.0]}
    curve |= {"length": [21.0, 15.0, 5.0], "proxy": [0.0, 0.5, 1.0]}
    found = tool.curves.figures_of(curve, -1.0)
    assert (found["half"], found["kl at half"]) == (pytest.approx(2.8), pytest.approx(1.8))
    assert (found["gold"], found["gain"], found["gold over the run"]) == (-5.0, 16.0, -10.0)
    never = tool.curves.figures_of({**curve, "gold": [-21.0, -15.0, -12.0]}, -1.0)
    assert (never["half"], never["kl at half"]) == (4.0, 3.0)


def run_folder(folder: Path, lengths: dict[int, list[int]], last: int) -> Path:
    """A run that drew two prompts' completions at some steps, and twice at the last one."""
    rows = [{"step": step, "tokens": tokens} for step, some in lengths.items() for tokens in some]
    rows += [{"step": last, "tokens": tokens} for tokens in lengths[last]]
    draws = [{"step": step, "prompts": 2, "completions": 1, "reward": {"mean": float(step)}} for step in lengths]
    for one in draws[1:]:
        one["kl"] = {"mean": one["step"] / 10}
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.json").write_text(json.dumps({"draws": [*draws, draws[-1]]}))
    return folder


def test_a_run_that_ended_early_stays_as_it_was(tool: Any, tmp_path: Path) -> None:
    """Draws at 0, 2 and 3, where it ended, of 8 planned; buffers of 16 for 4 updates, of which 3 began nothing new."""
    folder = run_folder(tmp_path, {0: [10, 20], 2: [4, 6], 3: [1, 1]}, last=3)
    facts = {"steps": 8, "every": 2, "fresh": True, "updates": 4, "buffer": 16, "few": 16}
    found = tool.curves.measured(folder, tool.curves.LengthReward(None), facts)
    assert found["curve"]["step"] == [0, 2, 4, 6, 8]
    assert found["curve"]["gold"] == [-15, -5, -1, -1, -1]
    assert found["curve"]["kl"] == [0, 0.2, 0.3, 0.3, 0.3]
    assert found["curve"]["proxy"] == [0, 2, 3, 3, 3]
    assert found["curve"]["drawn"] == [0, 16, 16, 32, 32]
    assert found["final"]["gold of few draws"] == -1
    target = tool.curves.measured(folder, tool.curves.LengthReward(5), {**facts, "fresh": False})
    assert target["curve"]["gold"] == [-10, -1, -4, -4, -4]
    assert "gold of few draws" not in target["final"]


def test_all_arms_make_as_many_updates_of_as_many_completions(tool: Any) -> None:
    config = yaml.safe_load((STUDIES / "length.yaml").read_text())
    own = tool.arms.Own.read(STUDIES / "length.yaml")
    arms = {arm.name: arm for arm in tool.arms.arms(own)}
    assert len(arms) == len(tool.arms.arms(own))
    data = config["data"]["init_args"]
    for arm in arms.values():
        assert arm.like is None or arms[arm.like].like is None
        if not arm.facts["fresh"]:
            assert arm.options["trainer.max_steps"] == own.steps
            assert arm.options["data.batch_size"] * own.completions == own.minibatch
            continue
        buffer, passes = arm.options.get("data.buffer", data["buffer"]), arm.options.get("data.passes", data["passes"])
        epochs = arm.options.get("trainer.max_epochs", config["trainer"]["max_epochs"])
        assert buffer // own.minibatch * passes * epochs == own.steps
        assert (arm.facts["updates"], arm.facts["buffer"]) == (buffer // own.minibatch * passes, buffer)


def test_every_claim_is_about_arms_there_are(tool: Any) -> None:
    names = {arm.name for arm in tool.arms.arms(tool.arms.Own.read(STUDIES / "length.yaml"))}
    claims = tool.report.claims()
    assert {name for claim in claims for side in claim.sides for name in side} <= names
    assert len({claim.text for claim in claims}) == len(claims)


def test_a_reward_model_that_was_stopped_is_trained_to_its_end(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped saves its adapter as well."""
    own, trained = tool.arms.Own.read(STUDIES / "length.yaml"), []
    folder = tool.study.reward_run(tmp_path, own, {}, "Min")
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "reward.json").touch()
    monkeypatch.setattr(tool.study, "in_child", trained.append)
    arm = next(arm for arm in tool.arms.arms(own) if arm.facts["task"] == "Min")
    for _ in range(2):
        tool.study.judged(tmp_path, own, {}, arm, 0)
    assert len(trained) == 1
    commands: list[list[str]] = []
    monkeypatch.setattr(tool.study, "lit_align", lambda command: commands.append(command) or 0)
    trained[0]()
    assert "--resume" in commands[0]  # which begins anew in a folder without a checkpoint


def test_another_reward_model_for_other_settings(tool: Any, tmp_path: Path) -> None:
    own = tool.arms.Own.read(STUDIES / "length.yaml")
    folders = {tool.study.reward_run(tmp_path, own, {}, task) for task in tool.arms.TASKS}
    folders.add(tool.study.reward_run(tmp_path, own, {"trainer.max_steps": 2}, "Min"))
    assert len(folders) == 4
    assert tool.study.reward_options(own, {}, "Skew")["data.shorten.share"] == 0.95
    assert tool.study.reward_options(own, {}, "Mode")["data.reward.target"] == own.target


def test_the_study_runs_from_end_to_end_and_redraws(quick_study: Callable[..., str], tmp_path: Path) -> None:
    printed = quick_study("length", "--seeds", "1")
    assert "search: 1 runs" in printed
    found = json.loads((tmp_path / "length.json").read_text())
    assert set(found["arms"]) == {"Min on-policy DPO", "Min offline DPO"}
    for arm in found["arms"].values():
        assert arm["curve"]["step"] == [0.0, 1.0, 2.0]
        assert arm["curve"]["gold"] == [-length for length in arm["curve"]["length"]]
        assert arm["curve"]["kl"][0] == 0 < arm["curve"]["kl"][-1]
        assert 0.5 <= arm["final"]["reward model"]["mean"] <= 1
    assert "| offline DPO |" in printed
    assert (tmp_path / "length_updates.png").stat().st_size > 1000
