"""Read rows from one local file: JSON lines, a JSON list, or Parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from lit_align.data.rows import DataError, Row, Source

FORMATS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def read_file(path: Path, max_rows: int | None = None) -> Source:
    """Read a file by its ending.

    Args:
        path: An existing file.
        max_rows: Read at most this many rows, > 0; None reads all.

    Returns:
        The rows; for JSON lines a row's number is its line number less 1, blank lines counted.

    Raises:
        DataError: If the ending is none of ``FORMATS`` or the file is damaged as a whole.
    """
    name = path.name.lower()
    try:
        if name.endswith((".jsonl", ".jsonl.gz")):
            return _read_json_lines(path, max_rows)
        if name.endswith((".json", ".json.gz")):
            return _read_json_list(path, max_rows)
        if name.endswith(".parquet"):
            return _read_parquet(path, max_rows)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the compressed file is damaged ({error}); copy or download it again") from error
    raise DataError(f"{path}: cannot read this kind of file; give one ending in {', '.join(FORMATS)}")


def number_rows(name: str, records: Iterable[Any], max_rows: int | None) -> Source:
    """Rows whose place is ``name[index]``, counted from 0.

    Args:
        name: What the records come from.
        records: One mapping of column to value each; anything else is a problem.
        max_rows: Take at most this many; None takes all.
    """
    rows: list[Row] = []
    problems: list[str] = []
    for index, fields in enumerate(islice(records, max_rows)):
        place = f"{name}[{index}]"
        if isinstance(fields, dict):
            rows.append(Row(index, place, fields))
        else:
            problems.append(f"{place}: {_not_an_object(fields)}")
    return Source(name, rows, problems)


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _read_json_lines(path: Path, max_rows: int | None) -> Source:
    """Line by line, so that a problem names its line; a bad line does not hide the next."""
    rows: list[Row] = []
    problems: list[str] = []
    offset = 0
    with _open(path) as file:
        for index, line in enumerate(file):
            if max_rows is not None and len(rows) + len(problems) >= max_rows:
                break
            place = f"{path.name}:{index + 1}"
            try:
                fields = _parse_line(line.removeprefix(b"\xef\xbb\xbf") if index == 0 else line, offset)
                if fields is not None:
                    rows.append(Row(index, place, fields))
            except ValueError as error:
                problems.append(f"{place}: {error}")
            offset += len(line)
    return Source(path.name, rows, problems)


def _parse_line(line: bytes, offset: int) -> dict[str, Any] | None:
    """One line of JSON lines; None for a blank one. ``offset`` is the line's first byte, counted from 0."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.start
        raise ValueError(
            f"not UTF-8 at byte {byte + 1} of the line, byte {offset + byte + 1} of the file (0x{line[byte]:02x}); "
            "save the file as UTF-8"
        ) from None
    if not text.strip():
        return None
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError(_not_an_object(fields))
    return fields


def _not_an_object(value: object) -> str:
    return f'a row must be an object such as {{"prompt": ..., "chosen": ..., "rejected": ...}}, not {json_kind(value)}'


def json_kind(value: object) -> str:
    """What JSON calls a value: "text", "a number", "a list" and so on."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    kinds = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _read_json_list(path: Path, max_rows: int | None) -> Source:
    with _open(path) as file:
        content = file.read()
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 at byte {error.start + 1} of the file; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}; "
            "if every line is an object of its own, name the file .jsonl"
        ) from None
    if not isinstance(records, list):
        raise DataError(f"{path}: must hold a list of objects, not {json_kind(records)}")
    return number_rows(path.name, records, max_rows)


def _read_parquet(path: Path, max_rows: int | None) -> Source:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    return number_rows(path.name, table.slice(0, max_rows).to_pylist(), None)
