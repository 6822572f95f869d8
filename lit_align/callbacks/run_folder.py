"""The run folder: made at the last moment, so that a run which cannot start leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.callbacks.loggers import METRICS, Rows, own_loggers, read_rows, replaced, write_rows
from lit_align.errors import UserError
from lit_align.finite import RECORD

CONFIG = "config.yaml"
"""The effective configuration; a folder that holds it is a run."""
SAMPLES = "samples.jsonl"
"""What was drawn for the held-out prompts, one completion a line."""


class RunFolder(Callback):
    """Owns the folder of a run: ``config.yaml``, ``data_report.json``, and by default CSV and TensorBoard logs.

    The folder appears when data and model have been loaded and training is about to start; its loggers are attached
    then, because Lightning would open them before it reads the data.

    Args:
        directory: The folder; it must not hold a run yet, unless that is gone on with.
        config: Text of ``config.yaml``; empty writes none.
        loggers: Whether to log to ``metrics.csv``, and to TensorBoard events if the trainer has no logger of its own.
        step: Optimizer steps after which the run in the folder is gone on with, >= 0; what it wrote of later ones is
            taken out when training starts; 0 begins it anew. None begins a run.

    Raises:
        UserError: If the folder already holds a run that is not gone on with.
    """

    def __init__(self, directory: str | Path, config: str = "", loggers: bool = True, step: int | None = None) -> None:
        self.path = Path(directory)
        self.config = config
        self.loggers = loggers
        self.step = step
        if step is None and ((self.path / CONFIG).exists() or (self.path / METRICS).exists()):
            raise UserError(
                f"run_dir={directory} already holds a run: go on with it by --resume {directory}, choose another "
                "folder, or leave run_dir out for a fresh one"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folder, write what is known by now, and attach the loggers."""
        self.path = Path(trainer.strategy.broadcast(str(self.path)))
        if trainer.is_global_zero:
            self._write(trainer)
        if self.loggers:
            users = trainer.loggers  # the rows go with any of them: curves and comparisons are made of these
            trainer.loggers = [*users, Rows(self.path)] if users else own_loggers(self.path, self.step or 0)

    def _write(self, trainer: Trainer) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir={self.path} cannot be made: {error.strerror}; choose another folder") from error
        if self.step is None and self.config:
            try:
                (self.path / CONFIG).touch(exist_ok=False)
            except FileExistsError as error:
                raise UserError(
                    f"run_dir={self.path} was taken by another run that began at the same time: start this one again"
                ) from error
        if self.step is not None:
            forget_after(self.path, self.step)
        if self.config:
            with replaced(self.path / CONFIG) as part:
                part.write_text(self.config, encoding="utf-8")
        report = getattr(trainer.datamodule, "report", None)  # type: ignore[attr-defined]
        if report is not None:
            trainer.datamodule.save_report(self.path / "data_report.json")  # type: ignore[attr-defined]
            print(report.render())
        going_on = "" if self.step is None else f", going on after step {self.step}"
        print(f"run folder: {self.path}{going_on}", flush=True)


def run_folder(trainer: Trainer) -> Path | None:
    """The folder of the trainer's run, or None if it writes none."""
    return next((callback.path for callback in trainer.callbacks if isinstance(callback, RunFolder)), None)  # type: ignore[attr-defined]


def forget_after(folder: Path, step: int) -> None:
    """Take out what a run wrote of optimizer steps that are going to be taken again.

    Args:
        folder: The run folder.
        step: Optimizer steps that stay taken, >= 0; with none of them nothing stays.
    """
    metrics = folder / METRICS
    if metrics.exists():
        rows = [row for row in read_rows(metrics) if int(row["step"]) < step]  # there they count from 0
        if rows:
            write_rows(metrics, list(rows[0]), rows)
        else:
            metrics.unlink()
    for path in (folder / name for name in (SAMPLES, RECORD) if (folder / name).exists()):
        # Not splitlines, which takes signs within a text for the end of a line as well.
        lines = path.read_text(encoding="utf-8").split("\n")
        lines = [line for line in lines if step > 0 and _step_of(line) <= step]
        with replaced(path) as part:
            part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _step_of(line: str) -> float:
    """The step that a line of JSON is of; infinity for half a line, which a kill can leave at the end."""
    try:
        found: Any = json.loads(line)
    except json.JSONDecodeError:
        return float("inf")
    return float(found.get("step", 0))
