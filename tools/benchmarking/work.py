"""What is trained on: batches of groups, real and synthetic."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lit_align.data import PreferenceData
from lit_align.data.collate import Group
from lit_align.data.loader import TrainingOrder

HH = "anthropic_hh_harmless_test.jsonl.gz"
MAX_LENGTH = 1024
"""TRL's default; a pair longer than this is cut on our side, before both see it."""


class Work(NamedTuple):
    """Batches of one kind.

    Attributes:
        name: As the table calls it.
        batches: Each a list of groups.
    """

    name: str
    batches: list[list[Group]]


def distinct_tokens(groups: Sequence[Group]) -> int:
    """Useful tokens: each prompt once, and every completion."""
    return sum(len(group.prompt_ids) + completion_tokens([group]) for group in groups)


def completion_tokens(groups: Sequence[Group]) -> int:
    """Tokens that are scored."""
    return sum(len(ids) for group in groups for ids in group.completion_ids)


def real_data() -> Path | None:
    """The folder of real pairs and a tokenizer of 32,000 words, or None where there is none."""
    folder = os.environ.get("LIT_ALIGN_DATA")
    found = folder and (Path(folder) / HH).is_file() and (Path(folder) / "stories15m").is_dir()
    return Path(folder) if folder and found else None


def real_pairs(folder: Path, rows: int | None) -> list[Group]:
    """The pairs of Anthropic's HH harmless test split, tokenized by Llama 2's tokenizer."""
    from transformers import AutoTokenizer

    data = PreferenceData(
        str(folder / HH),
        validation_split=None,
        validation_size=0,
        max_length=MAX_LENGTH,
        max_rows=rows,
    )
    data.load(AutoTokenizer.from_pretrained(folder / "stories15m"))
    loader = data.train_dataloader()
    return list(loader.dataset)  # type: ignore[call-overload]


def shuffled(pairs: list[Group], size: int, count: int) -> Work:
    """The first batches of the data module's order, pairs of all lengths together."""
    batches = TrainingOrder(len(pairs), size, seed=0).batches()[:count]
    return Work(f"HH pairs, batch {size}", [[pairs[index] for index in batch] for batch in batches])


def bucketed(pairs: list[Group], size: int, count: int) -> Work:
    """Batches of pairs as long as one another, from short to long, so that nobody pads."""
    ordered = sorted(pairs, key=lambda group: len(group.prompt_ids) + max(map(len, group.completion_ids)))
    places = [round((number + 0.5) / count * (len(ordered) - size)) for number in range(count)]
    return Work(f"HH pairs by length, batch {size}", [ordered[place : place + size] for place in places])


def synthetic(
    prompt: int, completion: int, columns: int, size: int, count: int, vocabulary: int, spread: float = 0.0
) -> Work:
    """Random ids.

    Args:
        prompt: Tokens of a prompt.
        completion: Tokens of a completion.
        columns: K.
        size: Groups of a batch.
        count: Batches.
        vocabulary: Words.
        spread: Share by which the lengths of both vary around these, in [0, 1).
    """
    generator = torch.Generator().manual_seed(0)

    def ids(middle: int) -> torch.Tensor:
        low, high = round(middle * (1 - spread)), round(middle * (1 + spread))
        length = int(torch.randint(max(1, low), high + 1, (), generator=generator))
        return torch.randint(3, vocabulary, (length,), generator=generator, dtype=torch.int32)

    batches = [
        [Group(row, ids(prompt), [ids(completion) for _ in range(columns)], None) for row in range(size)]
        for _ in range(count)
    ]
    return Work(f"K = {columns}, prompts of {prompt}, completions of {completion}, batch {size}", batches)
