"""The kinds of rows there are, and how each becomes an example: a prompt, its completions, their rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lit_align.data import parsers
from lit_align.data.columns import rename
from lit_align.data.fields import BadRow, DroppedRow
from lit_align.data.messages import Text, is_blank
from lit_align.data.report import SplitReport
from lit_align.data.rows import DataError, Source, raise_bad_rows
from lit_align.data.transcripts import ASSISTANT, is_transcript


class Format(NamedTuple):
    """A kind of row.

    Attributes:
        columns: Names of ours that it needs.
        parse: Reads one row.
    """

    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any]], parsers.Parts]


PAIR = Format(("prompt", "chosen", "rejected"), parsers.pair)
IMPLICIT_PAIR = Format(("chosen", "rejected"), parsers.implicit_pair)
SCORED = Format(("prompt", "completions", "rewards"), parsers.scored)
LABELLED = Format(("prompt", "completion", "label"), parsers.labelled)
DEMONSTRATION = Format(("prompt", "completion"), parsers.demonstration)
PROMPT = Format(("prompt",), parsers.prompt)
CONVERSATION = Format(("messages",), parsers.conversation)
PREFERENCES = (PAIR, IMPLICIT_PAIR, SCORED)
"""Kinds of rows with a preference; pairs win where a dataset also has scored completions."""


class Example(NamedTuple):
    """One prompt and its completions, as text or as messages alike.

    Attributes:
        row: Row in the source, see ``Row.number``.
        place: Where a person finds it.
        prompt: Text, or messages the last of which is not the assistant's.
        completions: For each completion its text, or a list of one message.
        rewards: One for each completion, larger is better, a label being +1 or -1; None for a demonstration, and for a
            pair, whose first completion is the better.
        transcript: Whether the prompt is an Anthropic-HH transcript.
        labelled: Whether the reward is the label of a single completion.
    """

    row: int
    place: str
    prompt: Text
    completions: list[Text]
    rewards: list[float] | None
    transcript: bool = False
    labelled: bool = False


def read_examples(
    source: Source,
    columns: Mapping[str, str] | None,
    report: SplitReport,
    formats: Sequence[Format] = PREFERENCES,
    least: int = 2,
) -> list[Example]:
    """Turn rows into examples; useless rows are dropped and counted, malformed ones raise together.

    Args:
        source: Rows as they were read.
        columns: Our names to the user's column names; None where they agree.
        report: Receives what was dropped and why.
        formats: The kinds of rows accepted; the first whose columns are there is read.
        least: Fewest completions a scored row is of use with, >= 1.

    Raises:
        DataError: If the columns fit no format, or any row is malformed (the first 20 are shown).
    """
    if not source.rows:
        raise_bad_rows(source.name, source.problems, len(source.problems))
        raise DataError(f"{source.name}: no rows; check that the file is not empty and max_rows is at least 1")
    rows, fitting = rename(source, dict(columns or {}), [format.columns for format in formats])
    format = next(format for format in formats if format.columns == fitting)
    examples: list[Example] = []
    problems = list(source.problems)
    for row in rows:
        try:
            example = Example(row.number, row.place, *format.parse(row.fields), labelled=format is LABELLED)
            examples.append(_checked(example, least if format is SCORED else None, report))
        except BadRow as problem:
            problems.append(f"{row.place}: {problem}")
        except DroppedRow as reason:
            report.drop(str(reason), row.place)
    raise_bad_rows(source.name, problems, len(source.rows) + len(source.problems))
    return examples


def _checked(example: Example, least: int | None, report: SplitReport) -> Example:
    """Drop rows with an empty completion, and scored ones (those with a ``least``) that have too few others."""
    kept = [number for number, text in enumerate(example.completions) if not is_blank(text)]
    emptied = len(kept) < len(example.completions)
    if least is None and emptied:
        raise DroppedRow("empty completion")
    if least is not None and len(kept) < least:
        raise DroppedRow("fewer than two completions" if least == 2 else "no completion")
    if emptied:
        report.note("empty completion left out of a group", example.place)
    transcript = isinstance(example.prompt, str) and _awaits_assistant(example.prompt)
    rewards = None if example.rewards is None else [example.rewards[number] for number in kept]
    return example._replace(
        completions=[example.completions[number] for number in kept], rewards=rewards, transcript=transcript
    )


def _awaits_assistant(prompt: str) -> bool:
    return is_transcript(prompt) and prompt.rstrip().endswith(ASSISTANT)
