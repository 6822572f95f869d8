"""Groups of token ids become a ``CompletionBatch``: the one place that pads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch


class Group(NamedTuple):
    """One prompt and its completions as token ids.

    Attributes:
        row: Row in the source.
        prompt_ids: int32 (P,), P >= 1.
        completion_ids: For each completion int32 (L,), L >= 1; it ends with the end of sequence unless it was cut.
        rewards: One for each completion, or None.
    """

    row: int
    prompt_ids: Tensor
    completion_ids: list[Tensor]
    rewards: list[float] | None

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all completions."""
        return len(self.prompt_ids) + sum(map(len, self.completion_ids))


def collate(groups: Sequence[Group], pad_id: int = 0) -> CompletionBatch:
    """Pad groups on the right to a batch.

    Args:
        groups: B >= 1 groups; they may differ in their number of completions.
        pad_id: Written where the masks are False; it means nothing, so any token id does.

    Returns:
        B prompts with K >= 1 completions each, K the largest number in a group; ``present`` is False for columns a
        group lacks. ``reward`` is None unless every group has rewards, and 0 in absent columns.
    """
    columns = max(1, *(len(group.completion_ids) for group in groups))
    empty = torch.empty(0, dtype=torch.int32)
    completions = [
        ids for group in groups for ids in [*group.completion_ids, *[empty] * (columns - len(group.completion_ids))]
    ]
    prompt_ids, prompt_mask = _pad([group.prompt_ids for group in groups], pad_id)
    completion_ids, completion_mask = _pad(completions, pad_id)
    shape = (len(groups), columns, completion_ids.shape[-1])
    counts = torch.tensor([len(group.completion_ids) for group in groups])
    return CompletionBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids.view(shape),
        completion_mask=completion_mask.view(shape),
        reward=_rewards(groups, columns),
        present=torch.arange(columns) < counts[:, None],
        row=torch.tensor([group.row for group in groups], dtype=torch.int64),
    )


def all_rewards(groups: Sequence[Group]) -> Tensor | None:
    """The rewards of all completions, float32 (N,), in order; None unless every group has rewards."""
    rewards = [group.rewards for group in groups if group.rewards is not None]
    if not groups or len(rewards) < len(groups):
        return None
    return torch.tensor([reward for values in rewards for reward in values], dtype=torch.float32)


def _pad(sequences: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right padding to the longest: ids int64 (N, T) and the mask of what is not padding, bool (N, T)."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(mask.shape, pad_id, dtype=torch.int64)
    ids[mask] = torch.cat(list(sequences)).long()
    return ids, mask


def _rewards(groups: Sequence[Group], columns: int) -> Tensor | None:
    rewards = [group.rewards for group in groups if group.rewards is not None]
    if len(rewards) < len(groups):
        return None
    return torch.tensor([values + [0.0] * (columns - len(values)) for values in rewards], dtype=torch.float32)
