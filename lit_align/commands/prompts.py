"""Prompts, with a chosen completion where there is one: from rows of any format, from lines of text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lit_align.assets import resolve
from lit_align.batch import CompletionBatch
from lit_align.data import parsers
from lit_align.data.chat import render_prompt
from lit_align.data.collate import Group, collate
from lit_align.data.fields import DroppedRow, list_of, text_of
from lit_align.data.formats import (
    CONVERSATION,
    DEMONSTRATION,
    IMPLICIT_PAIR,
    LABELLED,
    PAIR,
    SCORED,
    Example,
    Format,
    read_examples,
)
from lit_align.data.messages import Text, is_blank
from lit_align.data.report import SplitReport
from lit_align.data.rows import Row, Source
from lit_align.data.sources import read_rows
from lit_align.data.specials import find_specials
from lit_align.data.text import Limits, tokenize
from lit_align.data.transcripts import transcript_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def completions_alone(fields: dict[str, Any]) -> parsers.Parts:
    """prompt, completions: as scored ones, without rewards; empty ones are left out."""
    prompt, texts, _ = parsers.scored(fields | {"rewards": [0.0] * len(list_of(fields, "completions"))})
    kept = [text for text in texts if not is_blank(text)]
    if not kept:
        raise DroppedRow("no completion")
    return prompt, kept, None


def prompt_alone(fields: dict[str, Any]) -> parsers.Parts:
    """prompt: text or messages."""
    return text_of(fields, "prompt"), [], None


UNSCORED = Format(("prompt", "completions"), completions_alone)
PROMPT = Format(("prompt",), prompt_alone)
GIVEN = (SCORED, UNSCORED, PAIR, IMPLICIT_PAIR, LABELLED, DEMONSTRATION, CONVERSATION)
"""Rows that have completions, in any of their formats."""
COMPARABLE = (*(format for format in GIVEN if format is not UNSCORED), PROMPT)
"""Rows that say which completion is the good one, or have none."""


class Asked(NamedTuple):
    """Prompts to be answered.

    Attributes:
        batch: N prompts, and the chosen completion of each in column 0 where ``present``.
        texts: The prompts as a reward reads them: as written, or rendered by the chat template.
    """

    batch: CompletionBatch
    texts: list[str]

    @property
    def chosen(self) -> list[bool]:
        """Which prompts have a chosen completion."""
        return [bool(there) for there in self.batch.present[:, 0]]


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


def asked_of(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Asked:
    """Tokenize prompts and their chosen completions; what cannot be used is left out.

    Args:
        examples: Of any format.
        tokenizer: The policy's.
        limits: Token budgets.

    Raises:
        DataError: If a template does not accept a conversation.
    """
    report = SplitReport("prompts", read=len(examples))
    bare = [example._replace(completions=_chosen(example), rewards=None) for example in examples]
    groups = tokenize(bare, tokenizer, limits, report, comparing=False)
    return with_texts(groups, tokenizer)


def with_texts(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase) -> Asked:
    """The groups as a batch, in which a prompt without a completion has none present, and the prompts' texts."""
    end = torch.tensor([tokenizer.eos_token_id], dtype=torch.int32)
    filled = [group if group.completion_ids else group._replace(completion_ids=[end]) for group in groups]
    batch = collate(filled, int(tokenizer.eos_token_id))
    has = torch.tensor([bool(group.completion_ids) for group in groups])
    return Asked(batch._replace(present=batch.present & has[:, None]), prompt_texts(batch, tokenizer))


def prompt_texts(batch: CompletionBatch, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompts of a batch as a reward reads them, without what the tokenizer itself puts before a text."""
    before = find_specials(tokenizer).before
    texts = []
    for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True):
        kept = ids[mask].tolist()
        kept = kept[len(before) :] if kept[: len(before)] == before else kept
        texts.append(str(tokenizer.decode(kept, skip_special_tokens=False)))
    return texts


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
