"""Rows and masks against a definition written token by token."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from lit_align.attention import by_group, carrier
from lit_align.batch import CompletionBatch
from lit_align.layout import ATTENTION_WIDTH, Rows, attention_mask, separate_rows, to_columns, tree_rows
from tests.families import ragged_batch

WIDE, NARROW = 10**6, 1
"""Hidden sizes at which attention costs nothing, and next to everything."""

LAYOUTS = [functools.partial(tree_rows, hidden_size=size) for size in (NARROW, 8, WIDE)] + [separate_rows]


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
@pytest.mark.parametrize("lay", LAYOUTS)
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
@pytest.mark.parametrize("lay", LAYOUTS)
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


def of_lengths(*lengths: int) -> CompletionBatch:
    """Groups of one completion with this many tokens each, one of them the prompt's."""
    mask = torch.arange(max(lengths) - 1) < torch.tensor(lengths)[:, None] - 1
    ids, one = mask.long(), torch.ones(len(lengths), 1, dtype=torch.bool)
    return CompletionBatch(one.long(), one, ids[:, None], mask[:, None], None, one, torch.arange(len(lengths)))


@pytest.mark.parametrize("hidden_size", [NARROW, 8, WIDE])
def test_tree_rows_hold_each_prompt_once_and_no_group_in_two_rows(hidden_size: int) -> None:
    batch = ragged_batch()
    rows = tree_rows(batch, hidden_size)
    lengths = batch.prompt_mask.sum(-1) + batch.completion_mask.sum((-1, -2))
    for b, length in enumerate(lengths.tolist()):
        held = (rows.group == b).sum(-1)
        assert held.max() == held.sum() == length


def test_rows_are_as_long_as_the_price_of_attention_allows() -> None:
    batch = of_lengths(4, 3, 3, 3)
    assert tree_rows(batch, WIDE).input_ids.shape == (1, 13)  # nothing is empty
    assert tree_rows(batch, NARROW).input_ids.shape == (4, 4)  # no row longer than it must be
    # At 20 tokens attention costs as much as the rest: 2 · 7 · (1 + 7 / 20) = 18.9 is less than
    # 1 · 13 · (1 + 13 / 20) = 21.45, 3 · 6 · (1 + 6 / 20) = 23.4 and 4 · 4 · (1 + 4 / 20) = 19.2.
    assert tree_rows(batch, 5).input_ids.shape == (2, 7)


@pytest.mark.parametrize("hidden_size", [1, 3, 10, 1000])
def test_the_packing_is_near_the_best_there_is(hidden_size: int) -> None:
    """Against every way of dealing five groups to rows; the heuristic may miss the shortest row by a third."""
    for seed in range(5):
        lengths = torch.randint(2, 40, (5,), generator=torch.Generator().manual_seed(seed)).tolist()

        def cost(count: int, width: int) -> float:
            return count * width * (1 + width / (ATTENTION_WIDTH * hidden_size))

        least = math.inf
        for deal in itertools.product(range(5), repeat=5):
            filled = [sum(n for n, row in zip(lengths, deal, strict=True) if row == r) for r in set(deal)]
            least = min(least, cost(len(filled), max(filled)))
        found = cost(*tree_rows(of_lengths(*lengths), hidden_size).input_ids.shape)
        assert least <= found + 1e-9
        assert found <= 1.05 * least


@pytest.mark.parametrize("hidden_size", [1, 10, 100, 1000])
def test_numbers_of_rows_that_are_not_tried_would_not_have_been_cheaper(hidden_size: int) -> None:
    """Against longest first to the emptiest row, with every number of rows."""
    for seed in range(10):
        lengths = torch.randint(2, 60, (17,), generator=torch.Generator().manual_seed(seed)).tolist()
        least = math.inf
        for rows in range(1, 18):
            filled = [0] * rows
            for length in sorted(lengths, reverse=True):
                filled[filled.index(min(filled))] += length
            least = min(least, rows * max(filled) * (1 + max(filled) / (ATTENTION_WIDTH * hidden_size)))
        count, width = tree_rows(of_lengths(*lengths), hidden_size).input_ids.shape
        assert count * width * (1 + width / (ATTENTION_WIDTH * hidden_size)) == pytest.approx(least)


def test_padding_attends_to_itself_alone() -> None:
    rows = tree_rows(ragged_batch(), NARROW)
    assert (rows.group < 0).any()
    mask = attention_mask(rows)
    for r, i in (rows.group < 0).nonzero().tolist():
        assert mask[r, 0, i].nonzero()[:, 0].tolist() == [i]
        assert mask[r, 0, :, i].sum() == 1


@pytest.mark.parametrize("sizes", [(2, 3), (3, 3)])
def test_groups_of_any_sizes_attend_like_one_row_under_one_mask(sizes: tuple[int, int]) -> None:
    """Two queries' heads on one key head, one group behind the other, beside a mask of blocks over the whole row."""
    generator = torch.Generator().manual_seed(0)
    layer, total = torch.nn.Identity(), sum(sizes)
    layer.num_key_value_groups = 2  # type: ignore[assignment]
    query, key, value = (torch.randn(1, heads, total, 8, generator=generator) for heads in (4, 2, 2))
    below = [torch.full((1, 1, n, n), -torch.inf).triu(1) for n in sizes]
    whole = torch.full((total, total), -torch.inf)
    for start, mask in zip((0, sizes[0]), below, strict=True):
        whole[start : start + mask.shape[-1], start : start + mask.shape[-1]] = mask[0, 0]
    found, _ = by_group(layer, query, key, value, carrier(below))
    wide = (one.repeat_interleave(2, 1) for one in (key, value))
    expected = (query @ next(wide).transpose(2, 3) / 8**0.5 + whole).softmax(-1) @ next(wide)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_groups_attend_apart_and_masks_that_were_lost_on_their_way_are_refused() -> None:
    """Two groups of two tokens; the second token of each sees both of its own, with equal scores."""
    query, key = torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    value = torch.tensor([1.0, 3.0, 10.0, 30.0]).reshape(1, 1, 4, 1).expand(1, 1, 4, 2)
    below = torch.full((1, 1, 2, 2), -torch.inf).triu(1)
    layer = torch.nn.Identity()
    mask = carrier([below, below])
    found, _ = by_group(layer, query, key, value, mask)
    assert found[0, :, 0, 0].tolist() == [1.0, 2.0, 10.0, 20.0]
    with pytest.raises(RuntimeError, match="masks of the groups were lost"):
        by_group(layer, query, key, value, mask.clone())


def test_columns_put_values_back_in_place() -> None:
    batch = ragged_batch()
    count = int(batch.completion_mask.sum())
    columns = to_columns(torch.arange(1.0, count + 1), batch)
    assert torch.equal(columns[batch.completion_mask], torch.arange(1.0, count + 1))
    assert (columns[~batch.completion_mask] == 0).all()
