"""Read one split from a local folder: a file per split, or what ``datasets`` wrote by ``save_to_disk``."""

from __future__ import annotations

import re
from pathlib import Path

from lit_align.data.files import FORMATS, number_rows, read_file
from lit_align.data.rows import DataError, Row, Source, SplitMissing


def read_folder(folder: Path, split: str, max_rows: int | None = None) -> Source:
    """Read the files of a split: ``train.jsonl``, ``data/train.parquet``, ``train-00000-of-00002.parquet`` and so on.

    Args:
        folder: An existing folder.
        split: The files' stem, before ``-00000-of-00002``; several shards are joined in the order of their names.
        max_rows: Read at most this many rows, > 0; None reads all.

    Raises:
        SplitMissing: If no file belongs to the split; the message lists the splits there are.
        DataError: If the folder holds two files of the same split, not all of its shards, or none that can be read.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _read_saved(folder, split, max_rows)
    splits = _splits(folder)
    if split not in splits:
        found = ", ".join(sorted(splits)) or f"no file ending in {', '.join(FORMATS)}"
        raise SplitMissing(f'{folder} has no split "{split}"; found: {found}')
    files = splits[split]
    if len(files) > 1 and any(_shard(path) is None for path in files):
        names = ", ".join(path.name for path in files)
        raise DataError(f'{folder} has several files for the split "{split}": {names}; keep one, or name one of them')
    _check_shards(folder, split, files)
    return _join(f"{folder.name}/{split}", files, max_rows)


def _ending(path: Path) -> str | None:
    return next((ending for ending in sorted(FORMATS, key=len, reverse=True) if path.name.endswith(ending)), None)


def _shard(path: Path) -> re.Match[str] | None:
    """The parts of a shard's name: stem, number, count."""
    return re.fullmatch(r"(.+)-(\d+)-of-(\d+)", path.name.removesuffix(_ending(path) or ""))


def _check_shards(folder: Path, split: str, files: list[Path]) -> None:
    """Refuse shards that are not all there are, such as those of a broken download."""
    shards = [shard for path in files if (shard := _shard(path)) is not None]
    if not shards:
        return
    count, numbers = int(shards[0][3]), [int(shard[2]) for shard in shards]
    if len(set(numbers)) < len(numbers) or any(int(shard[3]) != count for shard in shards):
        raise DataError(f'{folder} has shards of more than one kind for the split "{split}"; keep those of one')
    first = 1 if count in numbers else 0  # some count from 1
    missing = [str(number) for number in range(first, first + count) if number not in numbers]
    if missing:
        raise DataError(
            f'{folder}: of the {count} shards of the split "{split}" these are missing: {", ".join(missing[:20])}; '
            f"fetch them, or give the path of one file, such as {files[0]}, to read it alone"
        )


def _splits(folder: Path) -> dict[str, list[Path]]:
    """Files by split; a ``data`` folder inside is looked into as well, as in repositories of the Hub."""
    paths = [path for place in (folder, folder / "data") if place.is_dir() for path in sorted(place.iterdir())]
    found: dict[str, list[Path]] = {}
    for path in paths:
        ending = _ending(path)
        if ending is not None and path.is_file():
            shard = _shard(path)
            found.setdefault(shard[1] if shard else path.name.removesuffix(ending), []).append(path)
    return found


def _join(name: str, files: list[Path], max_rows: int | None) -> Source:
    """The rows of all shards under one numbering; places keep the shard's own."""
    if len(files) == 1:
        return read_file(files[0], max_rows)
    rows: list[Row] = []
    problems: list[str] = []
    for path in files:
        left = None if max_rows is None else max_rows - len(rows) - len(problems)
        if left is not None and left <= 0:
            break
        source = read_file(path, left)
        rows += [row._replace(number=len(rows) + offset) for offset, row in enumerate(source.rows)]
        problems += source.problems
    return Source(name, rows, problems)


def _read_saved(folder: Path, split: str, max_rows: int | None) -> Source:
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise SplitMissing(f'{folder} has no split "{split}"; found: {", ".join(sorted(map(str, loaded)))}')
        return number_rows(f"{folder.name}/{split}", loaded[split], max_rows)
    own = str(loaded.split) if loaded.split is not None else split
    if own != split:
        raise SplitMissing(f'{folder} has no split "{split}"; found: {own}')
    return number_rows(folder.name, loaded, max_rows)
