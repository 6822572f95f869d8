"""What a row is wherever it comes from, and the error that shows all bad rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lit_align.errors import UserError

SHOWN = 20  # bad rows printed in one error


class DataError(UserError):
    """Data that cannot be trained on; the message names the place and the remedy."""


class SplitMissing(DataError):
    """The dataset exists, the split does not."""


class Row(NamedTuple):
    """One row as it was read.

    Attributes:
        number: Zero-based line or row in its source, the number kept in ``CompletionBatch.row``.
        place: Where a person finds it: ``train.jsonl:7`` counts lines from 1, ``train.parquet[6]`` rows from 0.
        fields: Column name to value.
    """

    number: int
    place: str
    fields: dict[str, Any]


class Source(NamedTuple):
    """The rows of one split.

    Attributes:
        name: What the rows were read from, for messages and the report.
        rows: Rows that could be read.
        problems: One message for each row that could not, beginning with its place.
    """

    name: str
    rows: list[Row]
    problems: list[str]


def raise_bad_rows(name: str, problems: Sequence[str], read: int) -> None:
    """Raise one error that shows the first 20 bad rows; do nothing where there is none.

    Args:
        name: What the rows were read from.
        problems: One message for each bad row, beginning with its place.
        read: Rows read, the bad ones included.

    Raises:
        DataError: If ``problems`` is not empty.
    """
    if not problems:
        return
    rest = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    lines = "\n  ".join([*problems[:SHOWN], *rest])
    raise DataError(f"{name}: {len(problems)} bad rows of {read}; correct or remove them:\n  {lines}")
