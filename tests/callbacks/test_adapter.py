"""The end of a run: adapter, tokenizer and card are there, also after an interruption."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lit_align.callbacks.adapter import SaveAdapter
from lit_align.callbacks.run_folder import RunFolder
from lit_align.callbacks.samples import SampleTable
from lit_align.errors import UserError
from tests.callbacks.toy import ToyData, ToyModule, trainer


class Toy(ToyModule):
    """A toy objective."""

    def __init__(self, stop_at: int = 0) -> None:
        super().__init__(stop_at)
        self.pair_settings = SimpleNamespace(model="owner/base")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


SAVED = {"adapter/adapter_model.safetensors", "adapter/tokenizer.json", "adapter/README.md", "README.md"}


def test_the_end_of_a_run_saves_everything_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    trainer(RunFolder(folder), SampleTable(prompts=2), SaveAdapter()).fit(Toy(), datamodule=ToyData())
    assert files(folder) >= SAVED
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/base"
    assert "12 of 12 optimizer steps" in card
    assert "| step 12 |" in card
    assert (folder / "adapter" / "README.md").read_text() == card
    out = capsys.readouterr().out
    assert str(folder / "adapter") in out
    assert "PeftModel.from_pretrained(" in out


def test_an_objective_without_a_docstring_is_saved_as_well(tmp_path: Path) -> None:
    class Bare(Toy):
        pass

    folder = tmp_path / "run"
    trainer(RunFolder(folder), SampleTable(prompts=2), SaveAdapter()).fit(Bare(), datamodule=ToyData())
    assert Bare.__doc__ is None
    assert files(folder) >= SAVED


def test_an_objective_saves_what_it_adds_and_says_how_to_load_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Judge(Toy):
        """A toy that judges."""

        generates = False
        loading = ("from somewhere import Judge", "judge = Judge({folder!r})")

        def save(self, directory: str | Path) -> None:
            super().save(directory)
            (Path(directory) / "more.json").write_text("{}")

    folder = tmp_path / "run"
    trainer(RunFolder(folder), SampleTable(prompts=2), SaveAdapter()).fit(Judge(), datamodule=ToyData())
    assert files(folder) >= SAVED | {"adapter/more.json"}
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "text-classification"
    assert "from somewhere import Judge\njudge = Judge('adapter')\n" in card
    assert "PeftModel" not in card
    out = capsys.readouterr().out
    assert f"load it with\n  from somewhere import Judge\n  judge = Judge({str(folder / 'adapter')!r})" in out


def test_an_interrupted_run_keeps_what_it_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trainer(RunFolder(tmp_path / "run"), SaveAdapter()).fit(Toy(stop_at=5), datamodule=ToyData())
    assert files(tmp_path / "run") >= SAVED
    assert "interrupted" in (tmp_path / "run" / "README.md").read_text()
    assert "interrupted after step 5" in capsys.readouterr().out


def test_a_run_that_cannot_go_on_keeps_what_it_learned(tmp_path: Path) -> None:
    class Unrewarded(Toy):
        """Its reward breaks down."""

        def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
            if batch_idx == 3:
                raise UserError("the reward is away")

    with pytest.raises(UserError, match="the reward is away"):
        trainer(RunFolder(tmp_path / "run"), SaveAdapter()).fit(Unrewarded(), datamodule=ToyData())
    assert files(tmp_path / "run") >= SAVED


def test_other_errors_save_nothing(tmp_path: Path) -> None:
    class Broken(Toy):
        def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
            if batch_idx == 3:
                raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        trainer(RunFolder(tmp_path / "run"), SaveAdapter()).fit(Broken(), datamodule=ToyData())
    assert not files(tmp_path / "run") & SAVED
