"""Cut completions short on purpose, for studies of data whose lengths are skewed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_align.data.collate import Group
from lit_align.data.rows import DataError


@dataclass(frozen=True)
class Shorten:
    """Completions end early, as in the Skew task of arXiv 2404.14367.

    Attributes:
        share: Of all completions, in [0, 1]; the study cuts 0.95.
        mean: Of the exponential distribution their new lengths are drawn from, in tokens, > 0.
    """

    share: float = 0.95
    mean: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise DataError(f"data.shorten.share={self.share} must be from 0 to 1 (0.95 is usual)")
        if self.mean <= 0:
            raise DataError(f"data.shorten.mean={self.mean} must be greater than 0, in tokens (10 is usual)")


def shortened(groups: Sequence[Group], how: Shorten, seed: int, eos_id: int) -> list[Group]:
    """Groups whose completions end early, with an end of sequence; one that is shorter already stays.

    Args:
        groups: Tokenized, every completion with its end of sequence.
        how: Which, and how short.
        seed: What is drawn for a completion depends on this, its row and its column alone.
        eos_id: The end of sequence.
    """
    return [
        group._replace(
            completion_ids=[
                _cut(ids, _length(how, f"{seed} {group.row} {column}"), eos_id)
                for column, ids in enumerate(group.completion_ids)
            ]
        )
        for group in groups
    ]


def _length(how: Shorten, name: str) -> int | None:
    """Tokens to end after, end of sequence included; None leaves a completion alone."""
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    chosen, level = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    if chosen >= how.share:
        return None
    return 1 + round(-how.mean * torch.log1p(torch.tensor(-level, dtype=torch.float64)).item())


def _cut(ids: Tensor, length: int | None, eos_id: int) -> Tensor:
    if length is None or length >= len(ids):
        return ids
    return torch.cat([ids[: length - 1], torch.tensor([eos_id], dtype=ids.dtype)])
