"""Exact resume by the real command line: a stopped run leaves in the end what one that was never stopped does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.table import Table

from lit_align import cli
from lit_align.__main__ import main
from lit_align.callbacks.validation import validation_table
from lit_align.checkpoint import Found, checkpoints_in
from lit_align.resume import may_change, nothing_left
from tests.survival.runs import arguments, assert_same, fit, resume, rows

TWICE = {"trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 2, "samples__prompts": 2}


DRAWN = {"data__batch_size": None, "data__reward": "tests.survival.runs.variety", "data__max_new_tokens": 6}
DRAWN |= {"data__buffer": 16, "data__minibatch": 8, "data__completions": 4}


@pytest.mark.parametrize(
    ("options", "config", "after"),
    [
        # 6 batches an epoch. Two make a step: validation after each, the end of an epoch is step 3.
        (TWICE, "eps_dpo", [1, 3, 4]),
        # Validation every third step is due at the second checkpoint of an interval of two; step 6 ends the epoch.
        ({"trainer__val_check_interval": 3, "trainer__log_every_n_steps": 2}, "tr_dpo", [3, 6, 7]),
        ({"trainer__max_steps": 8, "trainer__log_every_n_steps": 3}, "beta_dpo", [2, 6]),
        # Four steps on each buffer of fresh completions: amid one, at its end, and amid the next.
        (DRAWN, "on_policy_dpo", [3, 4, 5]),
        # Samples of the policy, drawn every other step.
        (
            {"data__samples": 4, "data__every_n_steps": 2, "data__max_new_tokens": 6, "trainer__max_epochs": 1},
            "spo",
            [3],
        ),
    ],
    ids=["accumulation", "mid-interval", "by steps", "fresh completions", "samples"],
)
def test_a_run_that_died_after_any_checkpoint_ends_as_if_it_had_not(
    model: str, moments: Path, options: dict[str, object], config: str, after: list[int]
) -> None:
    fit(model, config, **options)
    for number in after:
        assert resume(moments / str(number)) == 0
        assert_same(moments / str(number), "run")


def test_a_run_that_died_before_its_first_checkpoint_begins_anew_in_its_folder(
    model: str, moments: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(model)
    early = moments / "1"
    shutil.rmtree(early / "checkpoints")
    assert resume(early) == 0
    assert_same(early, "run")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_serves(
    model: str, moments: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(model)
    last = moments / "5" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    assert resume(moments / "5") == 0
    assert str(last) in caplog.text
    assert "previous.ckpt, after step 4" in caplog.text
    assert_same(moments / "5", "run")


def test_the_state_of_the_end_is_the_newest_only_when_all_else_is_done(model: str, moments: Path) -> None:
    """Killed while it draws its last samples, a run goes on from the step before, and makes up for the end."""
    fit(model, trainer__max_epochs=1)
    steps = {one.name: [found.step for found in checkpoints_in(one / "checkpoints")] for one in moments.iterdir()}
    assert steps == {"1": [1], "2": [2, 1], "3": [3, 2], "4": [4, 3], "5": [5, 4], "6": [6, 5]}
    assert not (moments / "5" / "adapter").exists()
    assert (moments / "6" / "adapter").exists()


def test_a_longer_run_from_the_end_of_a_shorter_one_is_the_longer_run(
    model: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steady = {"model__optim__schedule": "constant", "model__optim__warmup": 0, "trainer__max_epochs": -1}
    fit(model, run_dir="whole", trainer__max_steps=8, **steady)
    fit(model, run_dir="part", trainer__max_steps=4, **steady)
    assert resume("part") == 0
    assert "nothing to do for part: it has taken 4 steps, and trainer.max_steps is 4" in capsys.readouterr().out
    assert resume("part", "--trainer.max_steps=8") == 0
    out = capsys.readouterr().out
    assert "trainer.max_steps: 4 in the run until now, 8 from here on" in out
    assert "run folder: part, going on after step 4" in out
    one, two = rows("part"), rows("whole")
    assert [row for row in one if row["train/loss"]] == [row for row in two if row["train/loss"]]
    assert yaml.safe_load(Path("part/config.yaml").read_text())["trainer"]["max_steps"] == 8
    assert resume("part") == 0
    assert "it has taken 8 steps" in capsys.readouterr().out


def test_the_same_command_begins_goes_on_and_is_done(
    model: str, moments: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [arg for arg in arguments(model) if not arg.startswith("--run_dir")] + ["--resume"]
    assert main(command) == 0
    assert "no run in runs/eps_dpo yet" in capsys.readouterr().out
    (folder,) = Path("runs/eps_dpo").iterdir()
    assert main(command) == 0
    assert f"nothing to do for {folder}: it has done 2 epochs" in capsys.readouterr().out
    (folder / "checkpoints" / "last.ckpt").unlink()
    shutil.copytree(folder, "whole")
    shutil.rmtree(folder / "adapter")
    assert main(command) == 0
    assert f"run folder: {folder}, going on after step 11" in capsys.readouterr().out
    assert list(Path("runs/eps_dpo").iterdir()) == [folder]
    assert_same(folder, "whole")


def test_a_setting_that_cannot_change_is_refused_with_both_values(
    model: str, moments: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(model, trainer__max_epochs=1)
    before = sorted((path, path.stat().st_mtime_ns) for path in (moments / "3").rglob("*"))
    changed = [
        "--model.beta=0.5",
        "--data.batch_size=4",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.max_epochs=3",
    ]
    assert resume(moments / "3", *changed) == 2
    message = capsys.readouterr().err
    assert "model.beta: 0.01 in the run, 0.5 now" in message
    assert "data.batch_size: 3 in the run, 4 now" in message
    assert "trainer.accumulate_grad_batches: 1 in the run, 2 now" in message
    assert "max_epochs" not in message
    assert sorted((path, path.stat().st_mtime_ns) for path in (moments / "3").rglob("*")) == before
    assert main([*arguments(model, "ipo"), f"--resume={moments / '3'}"]) == 2
    assert "model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "free"),
    [
        ("trainer.max_steps", True),
        ("trainer.logger", True),
        ("trainer.callbacks", True),
        ("trainer.val_check_interval", True),
        ("samples.prompts", True),
        ("checkpoints.every_n_minutes", True),
        ("data.num_workers", True),
        ("trainer.precision", False),
        ("trainer.gradient_clip_val", False),
        ("model.optim.learning_rate", False),
        ("model", False),
        ("data.dataset", False),
        ("seed_everything", False),
    ],
)
def test_what_may_change_within_a_run(key: str, free: bool) -> None:
    assert may_change(key) is free


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--resume"], ["no run in runs/", "--config"]),
        (["--resume", "nowhere"], ["nowhere", "config.yaml"]),
    ],
)
def test_a_run_that_is_not_there_is_asked_for(
    place: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]
) -> None:
    assert main(["fit", *args]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_a_folder_with_a_run_is_refused_with_the_way_to_go_on(
    model: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").touch()
    assert main(arguments(model)) == 2
    assert "--resume run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "lifts"),
    [
        ("trainer.callbacks", True),  # a list of them, or one in the place of another
        ("trainer.callbacks.patience", True),
        ("trainer.max_time", True),
        ("trainer.log_every_n_steps", False),
    ],
)
def test_a_run_that_was_stopped_goes_on_where_what_stopped_it_is_lifted(key: str, lifts: bool) -> None:
    found = Found(Path("last.ckpt"), step=4, ended=True)
    told = nothing_left(found, {"max_steps": 9, "max_epochs": None}, {key: (1, 2)})
    assert told == "" if lifts else "it ended after step 4" in told


def test_the_state_that_a_run_would_go_on_from_is_validated(
    model: str, moments: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []

    def table(metrics: Mapping[str, Any], source: str) -> Table:
        titles.append(source)
        return validation_table(metrics, source)

    monkeypatch.setattr(cli, "validation_table", table)
    fit(model, trainer__max_epochs=1)
    last = moments / "5" / "checkpoints" / "last.ckpt"
    assert main(["validate", f"--resume={moments / '5'}", f"--ckpt_path={last}"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
    assert main(["validate", f"--resume={moments / '5'}"]) == 0
    assert titles == [f"validation of {last}"]
