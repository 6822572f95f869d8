"""The run folder appears when training starts, whole, and not before."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import Logger

from lit_align.callbacks.run_folder import RunFolder, forget_after, run_folder
from lit_align.errors import UserError
from tests.callbacks.toy import ToyData, ToyModule, trainer


class BrokenData(ToyData):
    def setup(self, stage: str) -> None:
        raise UserError("no data")


class BrokenModule(ToyModule):
    def configure_model(self) -> None:
        raise UserError("no model")


class Report:
    def render(self) -> str:
        return "12 rows read"


class ReportedData(ToyData):
    report = Report()

    def save_report(self, path: str | Path) -> None:
        Path(path).write_text("{}")


def test_the_folder_is_flat_and_holds_config_report_and_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "a" / "run", config="seed: 1\n")
    run = trainer(folder)
    run.fit(ToyModule(), datamodule=ReportedData())
    files = {path.name for path in (tmp_path / "a" / "run").iterdir()}
    assert {name for name in files if not name.startswith("events")} == {
        "config.yaml",
        "data_report.json",
        "metrics.csv",
    }
    assert len(files) == 4
    assert (folder.path / "config.yaml").read_text() == "seed: 1\n"
    rows = list(csv.DictReader((folder.path / "metrics.csv").open()))
    assert [float(row["train/loss"]) for row in rows if row["train/loss"]] == [2, 4, 6, 8, 10, 12]
    assert "12 rows read" in capsys.readouterr().out
    assert run_folder(run) == folder.path


@pytest.mark.parametrize(("module", "data"), [(ToyModule(), BrokenData()), (BrokenModule(), ToyData())])
def test_a_run_that_cannot_start_leaves_no_folder(tmp_path: Path, module: ToyModule, data: ToyData) -> None:
    with pytest.raises(UserError):
        trainer(RunFolder(tmp_path / "run", config="x")).fit(module, datamodule=data)
    assert list(tmp_path.iterdir()) == []


class Kept(Logger):
    """A logger as users bring them."""

    name, version = "kept", "0"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen += [metrics["train/loss"]] if "train/loss" in metrics else []


def test_the_rows_go_with_a_logger_of_the_users(tmp_path: Path) -> None:
    own = Kept()
    run = trainer(RunFolder(tmp_path / "run", config="x"), logger=own)
    run.fit(ToyModule(), datamodule=ToyData())
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [float(row["train/loss"]) for row in rows if row["train/loss"]] == own.seen == [2, 4, 6, 8, 10, 12]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "metrics.csv"]


def test_without_loggers_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = trainer(RunFolder("run", config="x", loggers=False))
    run.fit(ToyModule(), datamodule=ToyData())
    assert run.loggers == []
    assert [str(path) for path in Path().rglob("*") if path.is_file()] == ["run/config.yaml"]


def test_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").touch()
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder(tmp_path)


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        trainer(RunFolder(tmp_path / "file" / "run")).fit(ToyModule(), datamodule=ToyData())


def test_two_runs_that_begin_together_do_not_share_a_folder(tmp_path: Path) -> None:
    """Both find no folder, and one makes it while the other still loads."""
    first, second = (RunFolder(tmp_path / "run", config=f"seed: {n}\n") for n in (1, 2))
    trainer(first).fit(ToyModule(), datamodule=ToyData())
    metrics = (tmp_path / "run" / "metrics.csv").read_text()
    with pytest.raises(UserError, match="taken by another run"):
        trainer(second).fit(ToyModule(), datamodule=ToyData())
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"
    assert (tmp_path / "run" / "metrics.csv").read_text() == metrics


def test_what_looks_like_the_end_of_a_line_within_a_text_is_none(tmp_path: Path) -> None:
    rows = [{"step": step, "completion": f"one\u2028two\u0085three {step}"} for step in (0, 4, 8)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "samples.jsonl").write_text(
        "".join(f"{line}\n" for line in lines) + '{"step": 2, "comp', encoding="utf-8"
    )
    forget_after(tmp_path, 4)
    assert (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n") == [*lines[:2], ""]


def test_only_what_a_run_writes_by_steps_is_taken_out(tmp_path: Path) -> None:
    line = json.dumps({"step": 8}) + "\n"
    for name in ("samples.jsonl", "skipped_steps.jsonl", "evaluation.jsonl"):
        (tmp_path / name).write_text(line)
    forget_after(tmp_path, 4)
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == {"samples.jsonl": "", "skipped_steps.jsonl": "", "evaluation.jsonl": line}


def test_a_run_that_begins_anew_keeps_nothing(tmp_path: Path) -> None:
    """Its first samples are of step 0 and are drawn again."""
    (tmp_path / "samples.jsonl").write_text(json.dumps({"step": 0}) + "\n")
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,1.0\n")
    forget_after(tmp_path, 0)
    assert (tmp_path / "samples.jsonl").read_text() == ""
    assert not (tmp_path / "metrics.csv").exists()
