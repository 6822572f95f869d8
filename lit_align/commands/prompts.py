"""Prompts, with a chosen completion where there is one: from rows of any format, from lines of text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_align.assets import resolve
from lit_align.batch import CompletionBatch
from lit_align.data import parsers
from lit_align.data.chat import render_prompt
from lit_align.data.collate import collate
from lit_align.data.fields import DroppedRow, list_of
from lit_align.data.formats import (
    CONVERSATION,
    DEMONSTRATION,
    IMPLICIT_PAIR,
    LABELLED,
    PAIR,
    PROMPT,
    SCORED,
    Example,
    Format,
    read_examples,
)
from lit_align.data.messages import Text, is_blank
from lit_align.data.report import SplitReport
from lit_align.data.rows import Row, Source
from lit_align.data.sources import read_rows
from lit_align.data.text import Limits, tokenize
from lit_align.data.transcripts import transcript_messages
from lit_align.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def completions_alone(fields: dict[str, Any]) -> parsers.Parts:
    """prompt, completions: as scored ones, without rewards; empty ones are left out."""
    prompt, texts, _ = parsers.scored(fields | {"rewards": [0.0] * len(list_of(fields, "completions"))})
    kept = [text for text in texts if not is_blank(text)]
    if not kept:
        raise DroppedRow("no completion")
    return prompt, kept, None


UNSCORED = Format(("prompt", "completions"), completions_alone)
GIVEN = (SCORED, UNSCORED, PAIR, IMPLICIT_PAIR, LABELLED, DEMONSTRATION, CONVERSATION)
"""Rows that have completions, in any of their formats."""
COMPARABLE = (*(format for format in GIVEN if format is not UNSCORED), PROMPT)
"""Rows that say which completion is the good one, or have none."""


def distinct(examples: Sequence[Example]) -> list[Example]:
    """The first row of each prompt, in their order."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(json.dumps(example.prompt), example)
    return list(first.values())


def read_distinct(dataset: str, split: str, columns: Mapping[str, str] | None = None) -> list[Example]:
    """The rows of a dataset of any format, the first of each distinct prompt."""
    source = read_rows(resolve(dataset), split)
    report = SplitReport(source.name, read=len(source.rows) + len(source.problems))
    return distinct(read_examples(source, columns, report, COMPARABLE, least=1))


def lines_of(path: str) -> list[Example]:
    """Prompts of a .txt file, one a line, or of a file of rows in any format."""
    if not path.endswith(".txt"):
        return read_distinct(path, "train")
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [Row(number, f"{path}:{number + 1}", {"prompt": line}) for number, line in enumerate(lines)]
    return read_examples(Source(path, rows, []), None, SplitReport(path, read=len(rows)), (PROMPT,), least=1)


def tokenized(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> CompletionBatch:
    """Prompts, and the chosen completion of each in column 0 where ``present``; what cannot be used is left out.

    Args:
        examples: Of any format.
        tokenizer: The policy's.
        limits: Token budgets.

    Raises:
        UserError: If no prompt is left.
        DataError: If a template does not accept a conversation.
    """
    report = SplitReport("prompts", read=len(examples))
    bare = [example._replace(completions=_chosen(example), rewards=None) for example in examples]
    groups = tokenize(bare, tokenizer, limits, report, comparing=False)
    if not groups:
        raise UserError("no prompt is left: there must be one with a token at least")
    return collate(groups, int(tokenizer.eos_token_id or 0))


def as_text(example: Example, tokenizer: Any) -> str:
    """A prompt as a reward reads it: text as it is, messages by the chat template where there is one."""
    prompt = example.prompt
    templated = tokenizer is not None and tokenizer.chat_template is not None
    if example.transcript and templated:
        prompt = transcript_messages(str(prompt))
    if isinstance(prompt, str):
        return prompt
    return render_prompt(prompt, tokenizer) if templated else "\n".join(message["content"] for message in prompt)


def example_of(prompt: Text) -> Example:
    """A prompt of the command line, text or messages."""
    return Example(0, "--prompt", prompt, [], None)


def _chosen(example: Example) -> list[Text]:
    """The completion to compare with: the first of a pair, the best scored one, a good or a demonstrated one."""
    if example.rewards is None:
        return example.completions[:1]
    if example.labelled and example.rewards[0] < 0:
        return []
    return [example.completions[max(range(len(example.rewards)), key=example.rewards.__getitem__)]]
