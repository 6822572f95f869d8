"""Prompts and their completions, sampled from a model or given by a dataset."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_align.assets import resolve
from lit_align.batch import Sampling
from lit_align.commands.prompts import GIVEN, as_text, distinct
from lit_align.data.collate import collate
from lit_align.data.formats import PROMPT, Example, read_examples
from lit_align.data.report import SplitReport
from lit_align.data.sources import read_rows
from lit_align.data.text import Limits, tokenize
from lit_align.models import load_tokenizer
from lit_align.pair import PolicyReferencePair
from lit_align.settings import LoraSettings, PairSettings


def read(given: argparse.Namespace) -> tuple[list[Example], SplitReport]:
    """The rows, one for each distinct prompt where completions are drawn."""
    source = read_rows(resolve(given.dataset), given.split, given.max_rows)
    report = SplitReport(source.name, read=len(source.rows) + len(source.problems))
    columns = dict(pair.partition("=")[::2] for pair in given.columns)
    examples = read_examples(source, columns, report, (*GIVEN, PROMPT) if given.model else GIVEN, least=1)
    if given.model:
        examples = distinct(examples)
    return examples, report


class Group(NamedTuple):
    """A prompt as it is written down, as the reward reads it, and its completions; ``cut`` of them did not end."""

    prompt: Any
    asked: str
    completions: list[Any]
    cut: int = 0


class Policy:
    """Draws completions of examples from a model."""

    def __init__(self, given: argparse.Namespace) -> None:
        settings = PairSettings(given.model, lora=LoraSettings(adapter=given.adapter), revision=given.revision)
        self.tokenizer = load_tokenizer(settings)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pair = PolicyReferencePair(settings, self.device, self.tokenizer.eos_token_id)
        self.limits = Limits(given.max_length, given.max_length - given.max_new_tokens)
        self.sampling = Sampling(given.max_new_tokens, given.temperature, given.top_k, given.top_p, given.seed)
        self.completions = given.completions

    def groups(self, examples: Sequence[Example], report: SplitReport, size: int) -> Iterator[list[Group]]:
        """Groups of ``size`` prompts at a time."""
        bare = [example._replace(completions=[], rewards=None) for example in examples]
        by_row = {example.row: example for example in bare}
        end = [torch.tensor([self.tokenizer.eos_token_id])]
        prompts = [group._replace(completion_ids=end) for group in tokenize(bare, self.tokenizer, self.limits, report)]
        for start in range(0, len(prompts), size):
            batch = collate(prompts[start : start + size]).to(self.device)
            drawn = self.pair.generate(batch, self.completions, self.sampling).completions
            yield [
                self._group(by_row[int(drawn.row[i])], batch.prompt_ids[i][batch.prompt_mask[i]], ids, mask)
                for i, (ids, mask) in enumerate(zip(drawn.completion_ids, drawn.completion_mask, strict=True))
            ]

    def _group(self, example: Example, prompt: Tensor, ids: Tensor, mask: Tensor) -> Group:
        kept = [one[there].tolist() for one, there in zip(ids, mask, strict=True)]
        head = self._text(prompt.tolist())
        # A text on its own may lose its first space, so the prompt is decoded along with it.
        texts = [self._text(prompt.tolist() + one).removeprefix(head) for one in kept]
        full = (one for one in kept if len(one) == self.sampling.max_new_tokens)
        cut = sum(one[-1] not in self.pair.stop_ids for one in full)
        return Group(example.prompt, as_text(example, self.tokenizer), texts, cut)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def content(completion: Any) -> str:
    """The text of a completion, which may be one message."""
    return completion if isinstance(completion, str) else str(completion[0]["content"])


def given_groups(examples: Sequence[Example], tokenizer: Any, size: int) -> Iterator[list[Group]]:
    """The completions a dataset has, ``size`` prompts at a time; a tokenizer renders messages, if there is one."""
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        yield [Group(example.prompt, as_text(example, tokenizer), example.completions) for example in part]
