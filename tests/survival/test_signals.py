"""Signals: a checkpoint after the step at hand, an exit code that says so, and the same end after going on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.__main__ import main
from lit_align.callbacks.samples import SampleTable
from lit_align.checkpoint import checkpoints_in
from lit_align.module import AlignModule
from tests.survival.runs import arguments, assert_same, fit, resume

FEW = {"checkpoints__every_n_steps": "null", "run_dir": "stopped"}


def steps(folder: str = "stopped") -> list[int]:
    return sorted(found.step for found in checkpoints_in(Path(folder) / "checkpoints"))


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a signal come in the middle of the n-th micro-batch, from 0; the handler of Ctrl-C is noted after it."""
    step, seen = AlignModule.training_step, {"batches": 0, "handler": None}

    def plan(number: int, at: int) -> dict[str, Any]:
        def interrupted(self: AlignModule, batch: Any, batch_idx: int) -> torch.Tensor:
            if seen["batches"] == at:
                os.kill(os.getpid(), number)
                seen["handler"] = signal.getsignal(signal.SIGINT)
            seen["batches"] += 1  # type: ignore[operator]
            return step(self, batch, batch_idx)

        seen["batches"] = 0
        monkeypatch.setattr(AlignModule, "training_step", interrupted)
        return seen

    return plan


@pytest.mark.parametrize(
    ("number", "at", "saved"),
    [
        (signal.SIGTERM, 1, 1),  # amid the micro-batches of the first step
        (signal.SIGINT, 4, 3),  # in the last step of an epoch, whose validation is waited for
        (signal.SIGUSR1, 6, 4),
    ],
    ids=["SIGTERM", "SIGINT", "SIGUSR1"],
)
def test_a_signal_saves_after_the_step_at_hand_and_the_run_goes_on_exactly(
    model: str, place: Path, send: Any, capfd: pytest.CaptureFixture[str], number: int, at: int, saved: int
) -> None:
    fit(model, trainer__accumulate_grad_batches=2)
    seen = send(number, at)
    assert main(arguments(model, trainer__accumulate_grad_batches=2, **FEW)) == 128 + number
    assert seen["handler"] is signal.SIG_DFL  # a second Ctrl-C ends the process at once
    assert steps()[-1] == saved
    out, err = capfd.readouterr()
    assert f"{signal.Signals(number).name}: saving after this optimizer step" in err
    assert "python -m lit_align fit --resume stopped" in out
    assert "interrupted" in Path("stopped/README.md").read_text()
    assert Path("stopped/adapter/adapter_model.safetensors").is_file()
    assert resume("stopped") == 0
    assert_same("stopped", "run")


def test_a_signal_in_the_last_step_changes_nothing(model: str, place: Path, send: Any) -> None:
    fit(model)
    send(signal.SIGTERM, 11)
    fit(model, **FEW)
    assert_same("stopped", "run")


def test_a_signal_waits_for_a_validation_but_has_saved_before_it(
    model: str, place: Path, send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[list[int]] = []
    validate = AlignModule.validation_step

    def watched(self: AlignModule, *args: Any) -> None:
        kept.append(steps())
        validate(self, *args)

    monkeypatch.setattr(AlignModule, "validation_step", watched)
    send(signal.SIGTERM, 2)
    assert main(arguments(model, trainer__val_check_interval=3, **FEW)) == 143
    assert kept[0] == [3]


def test_without_checkpoints_a_signal_still_ends_the_run_in_order(model: str, place: Path, send: Any) -> None:
    send(signal.SIGTERM, 2)
    assert main(arguments(model, trainer__enable_checkpointing="false", run_dir="stopped")) == 143
    assert steps() == []
    assert Path("stopped/adapter/adapter_model.safetensors").is_file()


def test_signals_mean_afterwards_what_they_did_before(model: str, place: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    fit(model, trainer__max_epochs=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_signal_before_the_first_step_ends_the_run(model: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first samples are drawn Lightning's handler is in place, which only notes it."""
    take = SampleTable._take

    def interrupted(self: SampleTable, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *args, **kwargs)

    def step(*args: Any) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr(SampleTable, "_take", interrupted)
    monkeypatch.setattr(AlignModule, "training_step", step)
    assert main(arguments(model, samples__prompts=2, samples__max_new_tokens=4, **FEW)) == 143


def test_a_signal_ends_a_validation_with_its_own_code(model: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = AlignModule.validation_step

    def interrupted(self: AlignModule, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        validate(self, *args)

    monkeypatch.setattr(AlignModule, "validation_step", interrupted)
    command = arguments(model, samples__prompts=None, checkpoints__every_n_steps=None, data__validation_batch_size=2)
    assert main(["validate", *command[1:]]) == 143
