"""Match the columns of a dataset to the names used here, and say how to map those that do not match."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from typing import Any

from lit_align.data.rows import DataError, Row, Source

log = logging.getLogger(__name__)

Columns = tuple[str, ...]
"""The names of ours that a kind of row needs."""

_SYNONYMS = {
    "prompt": ("question", "instruction", "query", "input", "context", "problem"),
    "chosen": ("preferred", "accepted", "winner", "better", "good", "response_chosen", "positive", "response_w"),
    "rejected": ("dispreferred", "loser", "worse", "bad", "response_rejected", "negative", "response_l"),
    "completions": ("responses", "answers", "candidates", "outputs", "generations"),
    "rewards": ("scores", "ratings", "labels", "score"),
    "completion": ("response", "answer", "output", "target", "summary"),
    "label": ("desirable", "is_good", "good", "thumbs_up", "liked"),
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat"),
}


def rename(source: Source, columns: dict[str, str], formats: Sequence[Columns]) -> tuple[list[Row], Columns]:
    """Give the user's columns our names.

    Args:
        source: Rows with the user's names.
        columns: Our name to the user's.
        formats: The kinds of rows accepted, the preferred one first.

    Returns:
        The renamed rows, and the first of ``formats`` of which every name is in at least one row.

    Raises:
        DataError: If a key of ``columns`` is no name of ours, a value is no column, or the columns fit no format.
    """
    found = list(dict.fromkeys(name for row in source.rows for name in row.fields))
    known = list(dict.fromkeys(name for format in formats for name in format))
    _check_map(source.name, columns, found, known)
    taken = set(columns.values())
    ours = {columns.get(name, name): name for name in known if name in columns or name not in taken}
    rows = [
        row._replace(fields={ours[name]: value for name, value in row.fields.items() if name in ours})
        for row in source.rows
    ]
    names = {ours[name] for name in found if name in ours}
    for format in formats:
        if names.issuperset(format):
            if format == ("chosen", "rejected"):
                _tell_of_prompts(source, found, columns)
            return rows, format
    raise DataError(_no_format(source.name, found, names, formats))


def _tell_of_prompts(source: Source, found: list[str], columns: dict[str, str]) -> None:
    """Warn of a column that may be the prompt, where the prompt is taken for what both completions begin with."""
    unread = [name for name in found if name.lower() in _SYNONYMS["prompt"] and name not in columns.values()]
    if unread and isinstance(source.rows[0].fields.get(columns.get("chosen", "chosen")), str):
        log.warning(
            '%s: column "%s" is not read, and the prompt is what chosen and rejected begin with alike; if that column '
            "is the prompt, set data.columns to {prompt: %s}",
            source.name,
            unread[0],
            unread[0],
        )


def _check_map(place: str, columns: dict[str, Any], found: list[str], known: list[str]) -> None:
    for name, column in columns.items():
        if name not in known:
            raise DataError(
                f'columns: "{name}" is not a name of ours; accepted: {", ".join(known)}; write "our name: your column"'
            )
        if column not in found:
            near = difflib.get_close_matches(str(column), found, n=1)
            remedy = f'did you mean "{near[0]}"?' if near else "name one of these"
            raise DataError(
                f'columns: {place} has no column "{column}" for "{name}"; found: {", ".join(found)}; {remedy}'
            )


def _no_format(place: str, found: list[str], names: set[str], formats: Sequence[Columns]) -> str:
    """The columns found, the formats there are, and a mapping to paste."""
    listed = ", ".join(found) or "none"
    if {"completion", "label"} <= set(found) and not any("label" in format for format in formats):
        return (
            f"{place}: columns completion and label are unpaired data, which has nothing to compare; "
            "give chosen and rejected, or completions and rewards, or train on it with --data UnpairedData"
        )
    accepted = "; ".join(" + ".join(wanted) for wanted in formats)
    wanted = max(formats, key=lambda format: sum(name in names or bool(_guess(name, found)) for name in format))
    mapping = ", ".join(f"{name}: {_guess(name, found) or '<your column>'}" for name in wanted if name not in names)
    return (
        f"{place}: the columns fit no format.\n  found:  {listed}\n  wanted: {accepted}\n"
        f"  map yours in the config, for example:\n    data:\n      columns: {{{mapping}}}"
    )


def _guess(name: str, found: list[str]) -> str | None:
    """The column most likely meant by one of our names."""
    for column in found:
        if column.lower() in _SYNONYMS[name] or name in column.lower():
            return column
    near = difflib.get_close_matches(name, found, n=1, cutoff=0.7)
    return near[0] if near else None
