"""Where the tokens of a CompletionBatch stand in a forward pass, and who may attend to whom.

A tree row holds ``[prompt | completion 1 | ... | completion K]`` of one group, and of further groups where that is
cheaper. Each completion attends to its prompt and to itself, with positions that restart after the prompt, so a prompt
goes through the network once instead of K times. Models for which that is not exact get one row per completion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch

ATTENTION_WIDTH = 4
"""In rows of 4 · H tokens attention costs as much as the rest of a model of hidden size H: about what was measured on a
CPU in float32, forward and backward, for H from 256 to 768. Counting multiplications gives 6."""


class Rows(NamedTuple):
    """R rows of N tokens of a forward pass, and where the completion tokens stand and are predicted.

    Attributes:
        input_ids: Token ids, 0 at padding, int64 (R, N).
        position_ids: Position of each token in its own sequence, int64 (R, N).
        group: Which group a token belongs to, -1 at padding, int64 (R, N).
        segment: 0 for the prompt, k + 1 for completion k, int64 (R, N).
        predictor: Flat index into (R·N) of the position whose output predicts each completion token, in the order
            of ``completion_mask``'s true entries, int64 (T,).
        place: Flat index into (R·N) of each completion token itself, in the same order, int64 (T,).
    """

    input_ids: Tensor
    position_ids: Tensor
    group: Tensor
    segment: Tensor
    predictor: Tensor
    place: Tensor

    @property
    def cells(self) -> Tensor:
        """Cells that hold no token, and all cells R·N, int64 (2,)."""
        return torch.stack([(self.group < 0).sum(), torch.ones_like(self.group).sum()])


def tree_rows(batch: CompletionBatch, hidden_size: int) -> Rows:
    """Lay a batch out with shared prompts, in as many rows as cost least.

    Fewer, longer rows leave fewer cells empty but cost more attention: R rows of N tokens are taken to cost
    R · N · (1 + N / (4 · H)).

    Args:
        batch: The completions; a prompt must have at least one token.
        hidden_size: Width H of the model's hidden states.

    Returns:
        The rows; a group never spans two.
    """
    prompts = batch.prompt_mask.sum(-1)
    widest = ATTENTION_WIDTH * hidden_size
    row, offset, width = _pack((prompts + batch.lengths.sum(-1)).tolist(), widest, batch.prompt_ids.device)
    starts = (offset + prompts)[:, None] + batch.lengths.cumsum(-1) - batch.lengths
    return _place(batch, row, offset, row[:, None], starts, offset + prompts - 1, width)


def separate_rows(batch: CompletionBatch) -> Rows:
    """Lay a batch out as one row ``[prompt | completion]`` per completion, padded on the right.

    Args:
        batch: The completions; a prompt must have at least one token.

    Returns:
        B·K rows; group is the row's own number.
    """
    size, columns = batch.present.shape
    repeated = CompletionBatch(
        prompt_ids=batch.prompt_ids.repeat_interleave(columns, 0),
        prompt_mask=batch.prompt_mask.repeat_interleave(columns, 0),
        completion_ids=batch.completion_ids.flatten(0, 1)[:, None],
        completion_mask=batch.completion_mask.flatten(0, 1)[:, None],
        reward=None,
        present=batch.present.reshape(-1, 1),
        row=batch.row.repeat_interleave(columns),
    )
    prompts = repeated.prompt_mask.sum(-1)
    row = torch.arange(size * columns, device=prompts.device)
    width = int((prompts + repeated.lengths[:, 0]).max())
    return _place(repeated, row, torch.zeros_like(row), row[:, None], prompts[:, None], prompts - 1, width)


def attention_mask(rows: Rows, window: int | None = None) -> Tensor:
    """Which positions each position may attend to.

    Args:
        rows: The rows.
        window: Sliding window: a token sees itself and the ``window`` - 1 positions before it in its own sequence.

    Returns:
        True where attention is allowed, bool (R, 1, N, N). Padding sees itself alone, so that no row of it is empty.
    """
    size = rows.input_ids.shape[1]
    order = torch.arange(size, device=rows.input_ids.device)
    query, key = (slice(None), slice(None), None), (slice(None), None, slice(None))
    allowed = order[:, None] >= order[None, :]
    allowed = allowed & (rows.group[query] == rows.group[key]) & (rows.group[key] >= 0)
    allowed = allowed & ((rows.segment[key] == 0) | (rows.segment[key] == rows.segment[query]))
    if window is not None:
        position = rows.position_ids.int()
        allowed = allowed & (position[query] - position[key] < window)
    return (allowed | torch.eye(size, dtype=torch.bool, device=order.device)).unsqueeze(1)


def tree_inputs(rows: Rows, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of a transformers model that make it read tree rows as separate sequences.

    Args:
        rows: The rows.
        config: The model's config, which names its kinds of layers and their sliding window.
        dtype: The model's type.

    Returns:
        Ids, positions, and a mask, or one for each kind of layer where the model has several.
    """

    def mask(window: int | None) -> Tensor:
        # Added to the scores in the model's own type: attention would make, and keep, one such copy in every layer.
        allowed = attention_mask(rows, window)
        zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)

    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    masks: Any = mask(None if kinds else window)
    if kinds:
        masks = {"full_attention": masks}
        if "sliding_attention" in kinds:
            masks["sliding_attention"] = mask(window)
    return {"input_ids": rows.input_ids, "attention_mask": masks, "position_ids": rows.position_ids}


def to_columns(values: Tensor, batch: CompletionBatch) -> Tensor:
    """Put one value per completion token back where its token stands, 0 elsewhere.

    Args:
        values: One value for each true entry of ``completion_mask``, in its order, (T,).
        batch: The batch the values belong to.

    Returns:
        The values, (B, K, L); differentiable with respect to ``values``.
    """
    empty = torch.zeros(batch.completion_mask.shape, dtype=values.dtype, device=values.device)
    return empty.masked_scatter(batch.completion_mask, values)


def _pack(lengths: Sequence[int], widest: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Each group's row and offset, and the row length: for every number of rows a packing, and of these the cheapest.

    Groups go longest first, each to the row that holds least, which makes the fullest row at most 4/3 of the shortest
    possible (Graham, Bounds on Multiprocessing Timing Anomalies, 1969). What cannot be cheaper is not packed, since
    packing 500 groups into every number of rows takes a second.
    """
    total, longest = sum(lengths), max(lengths, default=0)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    best, found = math.inf, ([0] * len(lengths), [0] * len(lengths), 0)
    for rows in range(len(lengths), 0, -1):
        least = max(longest, -(-total // rows))
        if rows * least * (1 + least / widest) >= best:
            continue
        filled, row, offset = [0] * rows, [0] * len(lengths), [0] * len(lengths)
        for group in order:
            place = filled.index(min(filled))
            row[group], offset[group] = place, filled[place]
            filled[place] += lengths[group]
        width = max(filled)
        cost = rows * width * (1 + width / widest)
        if cost < best:
            best, found = cost, (row, offset, width)
    return torch.tensor(found[0], device=device), torch.tensor(found[1], device=device), found[2]


def _place(
    batch: CompletionBatch, row: Tensor, offset: Tensor, rows: Tensor, starts: Tensor, last: Tensor, width: int
) -> Rows:
    """Write prompts at (row, offset) and completions at (rows, starts); ``last`` is the last prompt token's place."""
    height = int(row.max()) + 1
    cells = torch.zeros(4, height * width, dtype=torch.int64, device=row.device)
    cells[2] = -1
    group = torch.arange(len(row), device=row.device)

    b, i = batch.prompt_mask.nonzero(as_tuple=True)
    rank = batch.prompt_mask.cumsum(-1)[b, i] - 1
    place = row[b] * width + offset[b] + rank
    cells[:, place] = torch.stack([batch.prompt_ids[b, i], rank, group[b], torch.zeros_like(rank)])

    b, k, i = batch.completion_mask.nonzero(as_tuple=True)
    rank = batch.completion_mask.cumsum(-1)[b, k, i] - 1
    begin = rows.expand_as(starts)[b, k] * width
    place = begin + starts[b, k] + rank
    prompts = batch.prompt_mask.sum(-1)
    cells[:, place] = torch.stack([batch.completion_ids[b, k, i], prompts[b] + rank, group[b], k + 1])
    predictor = torch.where(rank > 0, place - 1, begin + last[b])
    input_ids, position_ids, groups, segment = cells.view(4, height, width)
    return Rows(input_ids, position_ids, groups, segment, predictor, place)
