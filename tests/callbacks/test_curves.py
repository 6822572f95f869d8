"""Curves: the right values at the right steps, and a picture with a panel for each."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from lit_align.callbacks.curves import Curves, draw_curves
from lit_align.callbacks.run_folder import RunFolder
from tests.callbacks.toy import ToyData, ToyModule, trainer


def test_each_point_is_the_value_logged_at_its_step(tmp_path: Path) -> None:
    curves = Curves()
    trainer(RunFolder(tmp_path / "run"), curves, accumulate_grad_batches=2).fit(ToyModule(), datamodule=ToyData())
    assert curves.points["train/loss"] == [[2, 2.0], [4, 4.0], [6, 6.0]]
    assert curves.points["val/loss"] == [[6, 0.5]]
    assert imread(tmp_path / "run" / "curves.png").std() > 0


def test_a_quantity_without_values_gets_no_panel(tmp_path: Path) -> None:
    points = {"train/loss": [[1, 0.7], [2, 0.6]], "train/beta": []}
    assert draw_curves(points, tmp_path / "one.png")
    assert draw_curves(points | {"val/kl": [[2, 0.1]]}, tmp_path / "two.png")
    widths = [imread(tmp_path / name).shape[1] for name in ("one.png", "two.png")]
    assert widths[1] == 2 * widths[0]
    assert not draw_curves({"train/loss": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_an_interrupted_run_has_its_curves(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        trainer(RunFolder(tmp_path / "run"), Curves()).fit(ToyModule(stop_at=5), datamodule=ToyData())
    assert (tmp_path / "run" / "curves.png").stat().st_size > 0


def test_a_resumed_run_goes_on_from_its_points() -> None:
    first, second = Curves(), Curves()
    trainer(first, max_epochs=1).fit(ToyModule(), datamodule=ToyData())
    second.load_state_dict(first.state_dict())
    assert second.points == first.points != {}


def test_without_a_run_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer(Curves()).fit(ToyModule(), datamodule=ToyData())
    assert list(tmp_path.iterdir()) == []
