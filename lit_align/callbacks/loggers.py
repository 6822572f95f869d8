"""The logs of a run folder, written so that a kill or a full disk costs at most the row at hand, and never the run."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)

METRICS = "metrics.csv"


class Rows(Logger):
    """``metrics.csv``: a row each time something is logged, at once; a new column rewrites the file in one move.

    An existing file is continued. Lightning's own logger deletes it, and rewrites it in place.

    Args:
        directory: The run folder.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self.path = Path(directory) / METRICS
        self._columns: list[str] = []
        self._waiting: list[dict[str, Any]] = []
        self._troubled = False
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), [])

    @property
    def name(self) -> str:
        """None: the file lies in the run folder itself."""
        return ""

    @property
    def version(self) -> str:
        """None: the file lies in the run folder itself."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` says it all."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row; where the disk refuses it, it waits for the next one.

        Args:
            metrics: Logged name -> value.
            step: Optimizer steps, counted from 0.
        """
        self._waiting.append({**metrics, "step": step})
        self._troubled = not patiently(self._write, self.path, self._troubled)

    def _write(self) -> None:
        columns = sorted({*self._columns, *(name for row in self._waiting for name in row)})
        if columns != self._columns or not self.path.exists():
            old = list(read_rows(self.path)) if self.path.exists() else []
            write_rows(self.path, columns, [*old, *self._waiting])
        else:
            size = self.path.stat().st_size
            try:
                with self.path.open("a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, columns).writerows(self._waiting)
            except OSError:
                os.truncate(self.path, size)  # no half a row
                raise
        self._columns, self._waiting = columns, []


class Events(TensorBoardLogger):
    """TensorBoard events without Lightning's ``hparams.yaml``: ``config.yaml`` says it all."""

    _troubled = False

    @rank_zero_only
    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Add values, unless the disk refuses them."""
        write = super().log_metrics
        self._troubled = not patiently(lambda: write(*args, **kwargs), Path(self.log_dir), self._troubled)

    @rank_zero_only
    def save(self) -> None:
        """Flush the events."""
        self._troubled = not patiently(self.experiment.flush, Path(self.log_dir), self._troubled)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file."""
        patiently(lambda: super(Events, self).finalize(status), Path(self.log_dir), self._troubled)


def patiently(write: Any, path: Path, troubled: bool) -> bool:
    """Write, and warn the first time that the disk refuses.

    Args:
        write: What to do.
        path: Where, for the warning.
        troubled: Whether the time before was refused as well.

    Returns:
        Whether it was written.
    """
    try:
        write()
    except Exception as error:
        refusal: BaseException | None = error  # Lightning's TensorBoard logger wraps whatever it meets
        while refusal is not None and not isinstance(refusal, OSError):
            refusal = refusal.__context__
        if refusal is None:
            raise
        if not troubled:
            log.warning("%s cannot be written: %s. Training goes on", path, refusal.strerror or refusal)
        return False
    return True


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """The whole rows of a CSV file, column -> text; a torn last one is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if None not in row.values() and (row.get("step") or "").isdigit():
                yield row


def write_rows(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Replace a CSV file in one move."""
    with replaced(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place at the end of the context, or goes if that fails."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def own_loggers(directory: Path, step: int = 0) -> list[Logger]:
    """Loggers that write straight into a folder: ``metrics.csv``, and TensorBoard events.

    Args:
        directory: The run folder.
        step: Optimizer steps that a resumed run goes on from; TensorBoard hides what it has of later ones.
    """
    purge: dict[str, Any] = {"purge_step": step} if step else {}
    return [Rows(directory), Events(directory, name="", version="", default_hp_metric=False, **purge)]
