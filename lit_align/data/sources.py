"""Find a dataset by what the user wrote: a local file, a local folder, or a name on the Hugging Face Hub."""

from __future__ import annotations

import difflib
from pathlib import Path

from lit_align.data.files import FORMATS, read_file
from lit_align.data.folders import read_folder
from lit_align.data.hub import read_hub
from lit_align.data.rows import DataError, Source


def is_single_file(dataset: str) -> bool:
    """Whether ``dataset`` is one local file, which has no splits."""
    return Path(dataset).expanduser().is_file()


def read_rows(dataset: str, split: str, max_rows: int | None = None) -> Source:
    """Read one split of a dataset.

    Args:
        dataset: A local .jsonl, .json (each also with .gz) or .parquet file; a local folder with one such file per
            split, or written by ``datasets``' ``save_to_disk``; else a Hub name, ``name`` or ``name:config``.
        split: Which split; a single file has none, so it is ignored there.
        max_rows: Read at most this many rows, > 0; None reads all.

    Returns:
        The rows in the order of the source, and what is wrong with those that could not be read.

    Raises:
        SplitMissing: If the dataset has no such split.
        DataError: If there is no such dataset, or it is unreadable as a whole.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        return read_file(path, max_rows)
    if path.is_dir():
        return read_folder(path, split, max_rows)
    if dataset.endswith(tuple(FORMATS)) or dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise DataError(_missing(dataset, path))
    return read_hub(dataset, split, max_rows)


def _missing(dataset: str, path: Path) -> str:
    """Say what was looked for, and the nearest thing that exists."""
    folder = path.parent
    if not folder.is_dir():
        existing = next(parent for parent in folder.resolve().parents if parent.is_dir())
        return f'dataset "{dataset}": there is no folder {folder.resolve()}; {existing} is the last part that exists'
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()), n=1, cutoff=0.5)
    remedy = f"did you mean {folder / near[0]}?" if near else "check the path"
    return f'dataset "{dataset}": there is no file or folder {path.resolve()}; {remedy}'
