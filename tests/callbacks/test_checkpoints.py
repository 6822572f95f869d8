"""When checkpoints are made, and that a resumed run draws what an undisturbed one would have drawn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_align.callbacks import checkpoints
from lit_align.callbacks.checkpoints import Checkpoints
from lit_align.checkpoint import LAST, PREVIOUS, SafeCheckpointIO, checkpoints_in
from lit_align.errors import UserError
from lit_align.statefile import read_state
from tests.callbacks.toy import ToyData, ToyModule, trainer


class Drawing(ToyModule):
    """Draws from every generator at each micro-batch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.draws[-1] = (self.draws[-1], random.random(), np.random.random())  # type: ignore[call-overload]  # noqa: NPY002
        return loss


def run(folder: Path, keeper: Checkpoints, ckpt_path: Path | None = None, **options: Any) -> Drawing:
    module = Drawing()
    options = {"enable_checkpointing": True, "plugins": [SafeCheckpointIO()], "default_root_dir": folder, **options}
    trainer(keeper, **options).fit(module, datamodule=ToyData(), ckpt_path=ckpt_path)
    return module


def steps(folder: Path) -> dict[str, int]:
    return {found.path.name: found.step for found in checkpoints_in(folder / "checkpoints")}


@pytest.mark.parametrize(("every", "accumulate", "previous"), [(4, 1, 8), (5, 1, 10), (None, 1, None), (2, 3, 2)])
def test_steps_between_checkpoints_are_optimizer_steps(
    tmp_path: Path, every: int | None, accumulate: int, previous: int | None
) -> None:
    run(tmp_path, Checkpoints(every, None), accumulate_grad_batches=accumulate)
    expected = {LAST: 12 // accumulate} | ({PREVIOUS: previous} if previous else {})
    assert steps(tmp_path) == expected


def test_minutes_between_checkpoints_are_read_off_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is looked at once when training starts, once after each step, and once after each checkpoint."""
    clock = {"seconds": 0.0}

    def monotonic() -> float:
        clock["seconds"] += 25.0
        return clock["seconds"]

    monkeypatch.setattr(checkpoints.time, "monotonic", monotonic)
    made: list[int] = []
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, trainer: (made.append(trainer.global_step), save(self, trainer))
    )
    run(tmp_path, Checkpoints(None, 1.0))
    assert made == [3, 6, 9]  # 75 s after the one before it


def test_a_resumed_run_draws_what_an_undisturbed_one_draws(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    whole = run(tmp_path, Checkpoints(5, None))
    torch.manual_seed(99)
    resumed = run(tmp_path / "again", Checkpoints(5, None), tmp_path / "checkpoints" / PREVIOUS)
    assert resumed.draws == whole.draws[10:]
    assert len(set(whole.draws)) == 12


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".next.part").touch()
    (folder / "..next.part.part").touch()
    run(tmp_path, Checkpoints())
    assert sorted(path.name for path in folder.iterdir()) == [LAST]


@pytest.mark.parametrize(
    ("options", "name"), [({"every_n_steps": 0}, "every_n_steps"), ({"every_n_minutes": 0.0}, "every_n_minutes")]
)
def test_intervals_out_of_range_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=rf"checkpoints.{name} is 0"):
        Checkpoints(**options)


class StopIn(Callback):
    """Asks for the end in a hook, from an optimizer step on, as early stopping does; notes the newest checkpoint."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        self.kept: list[int | None] = []
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Trainer, *args: Any) -> None:
        self.kept.append(steps(Path(trainer.default_root_dir)).get(LAST))
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


def run_until_stopped(folder: Path, stop: StopIn, **options: Any) -> tuple[int, bool]:
    """The step of the newest checkpoint, and whether it is that of the end."""
    options = {"val_check_interval": 3, "max_epochs": 2, "plugins": [SafeCheckpointIO()], **options}
    options |= {"enable_checkpointing": True, "default_root_dir": folder}
    trainer(stop, Checkpoints(2, None), **options).fit(Drawing(), datamodule=ToyData())
    assert not list((folder / "checkpoints").glob(".*"))
    (last,) = (found for found in checkpoints_in(folder / "checkpoints") if found.path.name == LAST)
    return last.step, last.ended


@pytest.mark.parametrize(
    ("hook", "step", "last"),
    [
        ("on_train_batch_end", 5, 5),
        ("on_validation_end", 7, 9),  # no checkpoint is due after 9 steps
        ("on_validation_end", 6, 6),  # one is, and waits for the validation
        ("on_train_epoch_end", 7, 12),  # after the checkpoint of the epoch's end
    ],
)
def test_the_end_that_a_callback_asks_for_is_kept_as_the_end(tmp_path: Path, hook: str, step: int, last: int) -> None:
    assert run_until_stopped(tmp_path, StopIn(hook, step)) == (last, True)


def test_a_run_that_may_not_stop_yet_keeps_its_checkpoints(tmp_path: Path) -> None:
    stop = StopIn("on_train_batch_end", 1)
    assert run_until_stopped(tmp_path, stop, min_steps=9, min_epochs=0) == (9, True)
    assert stop.kept == [None, None, 2, 2, 4, 4, 6, 6, 8]


def test_an_end_amid_an_accumulated_step_is_kept_at_the_step_before(tmp_path: Path) -> None:
    """Validation comes after the fifth micro-batch, whose gradient no checkpoint could hold."""
    stop = StopIn("on_validation_end", 1)
    found = run_until_stopped(tmp_path, stop, val_check_interval=5, accumulate_grad_batches=2)
    assert found == (2, True)
    loop = read_state(tmp_path / "checkpoints" / LAST)["loops"]["fit_loop"]
    assert loop["epoch_loop.batch_progress"]["current"]["ready"] == 4
