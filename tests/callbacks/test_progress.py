"""Progress: which lines a log file gets, and what they say."""

from __future__ import annotations

import re

import pytest
from lightning.pytorch import Trainer
from rich.console import Console

from lit_align.callbacks.progress import Progress, duration, shown, total_steps
from tests.callbacks.toy import ToyData, ToyModule, trainer


def lines(capsys: pytest.CaptureFixture[str], progress: Progress, **options: object) -> list[str]:
    trainer(progress, **options).fit(ToyModule(), datamodule=ToyData())
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step", "validation"))]


def test_a_line_every_few_steps_has_the_values_of_its_own_step(capsys: pytest.CaptureFixture[str]) -> None:
    out = [re.sub(r"ETA \d+:\d\d", "ETA", line) for line in lines(capsys, Progress(every=4))]
    steps = [line for line in out if line.startswith("step")]
    assert steps == [f"step {n}/12  loss {n:.4f}  accuracy 0.25  ETA" for n in (4, 8, 12)]
    assert "validation after step 12  loss 0.5000" in out


def test_lines_come_no_more_often_than_there_is_something_new(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [line.split()[1] for line in lines(capsys, Progress(every=3)) if line.startswith("step")]
    assert steps == ["4/12", "8/12", "12/12"]  # three rounded up to the logging interval of two


def test_accumulated_steps_are_counted_once(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [line.split()[1] for line in lines(capsys, Progress(every=1), accumulate_grad_batches=3, max_steps=4)]
    assert steps[0] == "2/4"
    assert steps.count("4/4") == 1


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    assert lines(capsys, Progress(every=2)) == []


def test_a_terminal_gets_a_bar_with_the_same_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    monkeypatch.setenv("COLUMNS", "200")
    progress = Progress(every=2)
    assert not progress.plain
    run = trainer(progress)
    run.fit(ToyModule(), datamodule=ToyData())
    values = {"step": "12/12", "loss": "12.0000", "accuracy": "0.25", "val loss": "0.5000"}
    assert progress.get_metrics(run, run.lightning_module) == values
    assert "loss: 12.0000" in capsys.readouterr().out


def test_absent_values_are_left_out_and_the_rest_is_in_the_users_words() -> None:
    metrics = {"train/beta": 0.010444, "train/tokens_per_second": 1240.4, "train/kl": 0.3149, "val/loss": 1.0}
    assert shown(metrics, "train/") == {"beta": "0.01044", "kl": "0.315", "tokens/s": "1,240"}


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (41, "0:41"), (3661, "1:01:01")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, 12), ({"max_epochs": 3}, 36), ({"max_epochs": 2, "accumulate_grad_batches": 5}, 6), ({"max_steps": 5}, 5)],
)
def test_the_total_is_what_the_trainer_does(options: dict[str, int], steps: int) -> None:
    run = trainer(**options)
    run.fit(ToyModule(), datamodule=ToyData())
    assert total_steps(run) == steps == run.global_step
