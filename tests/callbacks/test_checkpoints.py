"""When checkpoints are made, and that a resumed run draws what an undisturbed one would have drawn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_align.callbacks import checkpoints
from lit_align.callbacks.checkpoints import Checkpoints
from lit_align.checkpoint import LAST, PREVIOUS, SafeCheckpointIO, checkpoints_in
from lit_align.errors import UserError
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
