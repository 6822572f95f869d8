"""Rows and masks against a definition written token by token."""

from __future__ import annotations

import pytest
import torch

from lit_align.batch import CompletionBatch
from lit_align.layout import Rows, attention_mask, separate_rows, to_columns, tree_rows
from tests.families import ragged_batch


def sequence_of(batch: CompletionBatch, b: int, k: int) -> list[int]:
    prompt = batch.prompt_ids[b][batch.prompt_mask[b]]
    return torch.cat([prompt, batch.completion_ids[b, k][batch.completion_mask[b, k]]]).tolist()


def visible(rows: Rows, mask: torch.Tensor, flat: int) -> list[tuple[int, int]]:
    """(position, token) of everything a flat index attends to, by position."""
    width = rows.input_ids.shape[1]
    r, i = divmod(flat, width)
    seen = mask[r, 0, i].nonzero()[:, 0]
    return sorted(zip(rows.position_ids[r, seen].tolist(), rows.input_ids[r, seen].tolist(), strict=True))


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("lay", [tree_rows, separate_rows])
def test_a_predictor_sees_exactly_its_own_prefix(lay: object, window: int | None) -> None:
    batch = ragged_batch()
    rows = lay(batch)  # type: ignore[operator]
    mask = attention_mask(rows, window)
    where = batch.completion_mask.nonzero().tolist()
    assert len(where) == len(rows.predictor)
    for flat, (b, k, i) in zip(rows.predictor.tolist(), where, strict=True):
        prefix = sequence_of(batch, b, k)[: int(batch.prompt_mask[b].sum()) + i]
        expected = list(enumerate(prefix))
        assert visible(rows, mask, flat) == (expected if window is None else expected[-window:])


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("lay", [tree_rows, separate_rows])
def test_the_place_of_a_token_holds_it_and_sees_it_and_its_prefix(lay: object, window: int | None) -> None:
    batch = ragged_batch()
    rows = lay(batch)  # type: ignore[operator]
    mask = attention_mask(rows, window)
    where = batch.completion_mask.nonzero().tolist()
    assert len(where) == len(rows.place) == len(set(rows.place.tolist()))
    for flat, (b, k, i) in zip(rows.place.tolist(), where, strict=True):
        assert rows.input_ids.flatten()[flat] == batch.completion_ids[b, k, i]
        prefix = sequence_of(batch, b, k)[: int(batch.prompt_mask[b].sum()) + i + 1]
        expected = list(enumerate(prefix))
        assert visible(rows, mask, flat) == (expected if window is None else expected[-window:])


def test_tree_rows_hold_each_prompt_once_and_fill_no_row_beyond_the_longest_group() -> None:
    batch = ragged_batch()
    rows = tree_rows(batch)
    lengths = batch.prompt_mask.sum(-1) + batch.completion_mask.sum((-1, -2))
    assert (rows.group >= 0).sum() == lengths.sum()
    assert rows.input_ids.shape[1] == lengths.max()
    for b in range(len(batch.row)):
        assert len((rows.group == b).any(-1).nonzero()) == 1  # a group never spans two rows


def test_short_groups_share_a_row() -> None:
    batch = ragged_batch()
    short = batch.completion_mask.clone()
    short[1:, 1:] = False
    short[1:, 0, 2:] = False
    shared = tree_rows(batch._replace(completion_mask=short))
    # 26 tokens in the first group; 5, 13 and 7 tokens in the others fit together in a second row.
    assert shared.input_ids.shape == (2, 26)


def test_padding_attends_to_itself_alone() -> None:
    rows = tree_rows(ragged_batch())
    mask = attention_mask(rows)
    for r, i in (rows.group < 0).nonzero().tolist():
        assert mask[r, 0, i].nonzero()[:, 0].tolist() == [i]
        assert mask[r, 0, :, i].sum() == 1


def test_columns_put_values_back_in_place() -> None:
    batch = ragged_batch()
    count = int(batch.completion_mask.sum())
    columns = to_columns(torch.arange(1.0, count + 1), batch)
    assert torch.equal(columns[batch.completion_mask], torch.arange(1.0, count + 1))
    assert (columns[~batch.completion_mask] == 0).all()
