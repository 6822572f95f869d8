"""Checkpoints: whole at every moment, a bad one named, the newest good one found, and Lightning's own saver served."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align import statefile
from lit_align.checkpoint import LAST, PREVIOUS, SafeCheckpointIO, advance, checkpoints_in, newest_good, sweep
from lit_align.errors import UserError
from lit_align.statefile import write_state
from tests.callbacks.toy import ToyData, ToyModule


def state(step: int, **more: Any) -> dict[str, Any]:
    """As much of a checkpoint as is read to judge it."""
    progress = {"epoch_progress": {"current": {"completed": 0}}, "epoch_loop.batch_progress": {"is_last_batch": False}}
    return {"global_step": step, "loops": {"fit_loop": progress}, "optimizer_states": [], **more}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_one_of_the_most_steps_is_the_newest_whatever_its_name_and_time(tmp_path: Path) -> None:
    for name, step in (("a.ckpt", 5), (LAST, 3), (PREVIOUS, 2)):
        write_state(tmp_path / name, state(step))
    found = newest_good(tmp_path)
    assert found is not None
    assert (found.path.name, found.step) == ("a.ckpt", 5)


def test_weights_alone_are_nothing_to_go_on_from(tmp_path: Path) -> None:
    write_state(tmp_path / "weights.ckpt", {"global_step": 9, "state_dict": {}})
    assert newest_good(tmp_path) is None


@pytest.mark.parametrize("bad", ["damaged", "cut", "empty", "pickle"])
def test_a_bad_checkpoint_is_named_and_the_newest_good_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    write_state(tmp_path / PREVIOUS, state(4))
    last = tmp_path / LAST
    write_state(last, state(6))
    if bad == "pickle":
        torch.save(state(6), last)
    elif bad == "damaged":
        damage(last)
    else:
        last.write_bytes(last.read_bytes()[: 0 if bad == "empty" else -1])
    with caplog.at_level(logging.WARNING):
        found = newest_good(tmp_path)
    assert found is not None
    assert (found.path.name, found.step) == (PREVIOUS, 4)
    assert str(last) in caplog.text
    assert "previous.ckpt, after step 4" in caplog.text
    with pytest.raises(UserError, match=r"last.ckpt cannot be used: .*previous.ckpt is the newest good one"):
        SafeCheckpointIO().load_checkpoint(last)


def test_without_a_good_checkpoint_the_run_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_good(tmp_path / "absent") is None
    (tmp_path / LAST).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert newest_good(tmp_path) is None
    assert "the run begins anew" in caplog.text


class Killed(BaseException):
    """Stands for kill -9: nothing may clean up behind it."""


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_between_any_two_system_calls_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Every call that the disk sees is counted, and each in turn is the last one made."""
    calls = {"made": 0, "allowed": 10**9}

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if calls["made"] >= calls["allowed"]:
                raise Killed
            calls["made"] += 1
            return function(*args, **kwargs)

        return call

    def no_link(*args: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", counted(os.link if links else no_link))
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))

    def save(folder: Path, step: int) -> None:
        fresh = folder / ".next.part"
        write_state(fresh, state(step))
        advance(fresh, folder, keep_previous=True)

    save(tmp_path / "count", 1)
    save(tmp_path / "count", 2)
    calls["made"] = 0
    save(tmp_path / "count", 3)
    total = calls["made"]
    assert total >= 5
    for allowed in range(total):
        folder = tmp_path / str(allowed)
        calls.update(made=0, allowed=10**9)
        save(folder, 1)
        save(folder, 2)
        calls.update(made=0, allowed=allowed)
        with pytest.raises(Killed):
            save(folder, 3)
        calls.update(made=0, allowed=10**9)
        found = newest_good(folder)
        assert found is not None
        assert found.step in (2, 3)
        assert not any(one.problem for one in checkpoints_in(folder))
        sweep(folder)
        save(folder, 4)
        assert [one.step for one in checkpoints_in(folder)] == [4, found.step]


def test_a_full_disk_costs_the_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver, path = SafeCheckpointIO(), tmp_path / LAST
    saver.save_checkpoint(state(1), path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(statefile.os, "fsync", full)
        with caplog.at_level(logging.WARNING):
            saver.save_checkpoint(state(2), tmp_path / "other.ckpt")
        saver.remove_checkpoint(path)  # as a callback that keeps one would ask for now
    assert "NOT SAVED" in caplog.text
    assert "No space left on device" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == [LAST]
    assert saver.load_checkpoint(path)["global_step"] == 1
    saver.save_checkpoint(state(3), tmp_path / "other.ckpt")
    saver.remove_checkpoint(path)
    assert [file.name for file in tmp_path.iterdir()] == ["other.ckpt"]


def test_state_that_cannot_be_kept_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"state.callbacks.Mine is a"):
        SafeCheckpointIO().save_checkpoint({"callbacks": {"Mine": object()}}, tmp_path / LAST)


def test_lightnings_own_saver_keeps_its_best_few(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", monitor="train/loss", mode="max", save_top_k=2, every_n_train_steps=1)
    module = ToyModule()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = Trainer(**quiet, plugins=[SafeCheckpointIO()], callbacks=[saver], log_every_n_steps=1, max_epochs=1)
    trainer.fit(module, datamodule=ToyData(batches=5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=4.ckpt", "step=5.ckpt"]
    again = Trainer(**quiet, plugins=[SafeCheckpointIO()], max_epochs=2, enable_checkpointing=False)
    again.fit(ToyModule(), datamodule=ToyData(batches=5), ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert again.global_step == 10
