"""The run folder: made at the last moment, so that a run which cannot start leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lit_align.errors import UserError


class RunFolder(Callback):
    """Owns the folder of a run: ``config.yaml``, ``data_report.json``, and by default CSV and TensorBoard logs.

    The folder appears when data and model have been loaded and training is about to start; its loggers are attached
    then, because Lightning would open them before it reads the data.

    Args:
        directory: The folder; it must not hold a run yet.
        config: Text of ``config.yaml``; empty writes none.
        loggers: Whether to log to ``metrics.csv`` and TensorBoard events; False leaves the trainer's loggers alone.

    Raises:
        UserError: If the folder already holds a run.
    """

    def __init__(self, directory: str | Path, config: str = "", loggers: bool = True) -> None:
        self.path = Path(directory)
        self.config = config
        self.loggers = loggers
        if (self.path / "config.yaml").exists() or (self.path / "metrics.csv").exists():
            raise UserError(
                f"run_dir={directory} already holds a run; choose another folder, or leave run_dir out for a fresh one"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folder, write what is known by now, and attach the loggers."""
        self.path = Path(trainer.strategy.broadcast(str(self.path)))
        if trainer.is_global_zero:
            self._write(trainer)
        if self.loggers:
            trainer.loggers = own_loggers(self.path)

    def _write(self, trainer: Trainer) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir={self.path} cannot be made: {error.strerror}; choose another folder") from error
        if self.config:
            (self.path / "config.yaml").write_text(self.config, encoding="utf-8")
        report = getattr(trainer.datamodule, "report", None)  # type: ignore[attr-defined]
        if report is not None:
            trainer.datamodule.save_report(self.path / "data_report.json")  # type: ignore[attr-defined]
            print(report.render())
        print(f"run folder: {self.path}", flush=True)


def run_folder(trainer: Trainer) -> Path | None:
    """The folder of the trainer's run, or None if it writes none."""
    return next((callback.path for callback in trainer.callbacks if isinstance(callback, RunFolder)), None)  # type: ignore[attr-defined]


class Events(TensorBoardLogger):
    """TensorBoard events without Lightning's ``hparams.yaml``: ``config.yaml`` says it all."""

    def save(self) -> None:
        """Flush the events."""
        self.experiment.flush()


def own_loggers(directory: Path) -> list[Logger]:
    """Loggers that write straight into a folder: ``metrics.csv``, flushed as it grows, and TensorBoard events."""
    return [
        CSVLogger(directory, name="", version="", flush_logs_every_n_steps=1),
        Events(directory, name="", version="", default_hp_metric=False),
    ]
