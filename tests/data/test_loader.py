from __future__ import annotations

import itertools

import pytest
import torch

from lit_align.data.collate import Group, collate
from lit_align.data.loader import ResumableLoader, TrainingOrder, ValidationOrder, training_batches, validation_loader
from lit_align.data.rows import DataError

LENGTHS = [(7 * number) % 40 + 1 for number in range(60)]
"""Lengths of groups, no two alike among the first forty."""


def groups(count: int) -> list[Group]:
    one = torch.ones(1, dtype=torch.int32)
    return [Group(row, one, [one, one], None) for row in range(count)]


def windows(count: int, batch_size: int, rank: int = 0, world_size: int = 1, window: int = 3) -> TrainingOrder:
    return TrainingOrder(count, batch_size, 0, rank, world_size, lengths=LENGTHS, window=window)


def loader(count: int = 13, batch_size: int = 2, seed: int = 0, workers: int = 0, window: int = 1) -> ResumableLoader:
    order = TrainingOrder(count, batch_size, seed, lengths=LENGTHS, window=window)
    return ResumableLoader(groups(count), order, collate, workers)


def rows(batches) -> list[list[int]]:
    return [batch.row.tolist() for batch in batches]


SHAPES = list(itertools.product([1, 2, 5, 12, 13, 16, 17], [1, 2, 3, 8], [1, 2, 3]))


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(("count", "batch_size", "world_size"), [s for s in SHAPES if s[0] >= s[2]])
def test_every_epoch_shares_the_groups_among_the_ranks(count, batch_size, world_size, window):
    ranks = [windows(count, batch_size, rank, world_size, window) for rank in range(world_size)]
    for epoch in (0, 1):
        for order in ranks:
            order.set_epoch(epoch)
        shares = [list(order) for order in ranks]
        assert {len(share) for share in shares} == {training_batches(count, batch_size, world_size)}
        assert all(1 <= len(batch) <= batch_size for share in shares for batch in share)
        seen = [group for share in shares for batch in share for group in batch]
        assert len(seen) == len(set(seen))
        assert 0 <= count - len(seen) < world_size
        assert world_size > 1 or len(seen) == count


@pytest.mark.parametrize("window", [1, 2])
def test_the_global_batches_depend_only_on_the_global_batch_size(window):
    alone = list(windows(21, 4, window=window))
    pair = [list(windows(21, 2, rank, 2, window)) for rank in (0, 1)]
    together = [sorted(first + second) for first, second in zip(*pair, strict=True)]
    assert together == [sorted(batch) for batch in alone[: len(together)]]
    assert len(together) == 5  # the 21st group is too few for two ranks


@pytest.mark.parametrize("window", [1, 4])
def test_the_order_is_a_pure_function_of_seed_and_epoch(window):
    options = {"lengths": LENGTHS, "window": window}
    order = TrainingOrder(50, 4, seed=3, **options)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    torch.manual_seed(99)
    fresh = TrainingOrder(50, 4, seed=3, **options)
    fresh.set_epoch(1)
    assert list(fresh) == second != first
    fresh.set_epoch(0)
    assert list(fresh) == first
    assert list(TrainingOrder(50, 4, seed=4, **options)) != first
    assert list(TrainingOrder(5, 2, seed=3, shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_a_window_holds_the_groups_it_would_unsorted_in_batches_of_neighbours_by_length():
    plain, found = list(windows(38, 3, window=1)), list(windows(38, 3, window=4))
    for start in (0, 4, 8):  # 12 whole batches in windows of 4, and the last two groups by themselves
        before = [group for batch in plain[start : start + 4] for group in batch]
        after = found[start : start + 4]
        neighbours = sorted(before, key=LENGTHS.__getitem__)
        cut = [neighbours[first : first + 3] for first in range(0, 12, 3)]
        assert sorted(after, key=lambda batch: LENGTHS[batch[0]]) == cut
    assert found[12] == plain[12]


def test_the_batches_of_a_window_come_in_no_order_of_length():
    order = windows(60, 2, window=30)
    places = torch.zeros(30)
    for epoch in range(40):
        order.set_epoch(epoch)
        lengths = torch.tensor([float(sum(LENGTHS[group] for group in batch)) for batch in order])
        places += lengths.argsort().argsort()
    assert (places / 40 - 14.5).abs().max() < 6  # the mean of 40 ranks from 0 to 29 deviates by 1.4


def test_the_ranks_parts_of_a_sorted_batch_are_of_similar_length():
    """Every second group of a sorted batch: the parts differ by less than the longest and the shortest of the batch."""
    for first, second in zip(windows(40, 2, 0, 2, 10), windows(40, 2, 1, 2, 10), strict=True):
        parts = [sum(LENGTHS[group] for group in part) for part in (first, second)]
        lengths = [LENGTHS[group] for group in first + second]
        assert abs(parts[0] - parts[1]) <= max(lengths) - min(lengths)


def test_an_order_that_is_not_shuffled_is_not_sorted():
    order = TrainingOrder(5, 2, seed=3, shuffle=False, lengths=[5, 4, 3, 2, 1], window=2)
    assert list(order) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("count", "batch_size", "world_size"), [s for s in SHAPES if s[0] >= s[2]])
def test_validation_sees_every_group_once_in_equally_many_batches(count, batch_size, world_size):
    shares = [list(ValidationOrder(count, batch_size, rank, world_size)) for rank in range(world_size)]
    assert sorted(group for share in shares for batch in share for group in batch) == list(range(count))
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == len(ValidationOrder(count, batch_size, 0, world_size))
    most = 2 if batch_size == 1 and count % world_size else batch_size
    assert all(1 <= len(batch) <= most for share in shares for batch in share)


@pytest.mark.parametrize("order", [lambda: TrainingOrder(2, 1, 0, 0, 3), lambda: ValidationOrder(2, 1, 0, 3)])
def test_more_ranks_than_groups_are_refused_with_a_remedy(order):
    with pytest.raises(DataError, match=r"2 .* groups for 3 ranks: every rank needs one; use at most 2 devices"):
        order()


@pytest.mark.parametrize(("workers", "window"), [(0, 1), (2, 1), (0, 2)])
def test_a_loader_continues_where_another_stopped(workers, window):
    whole = rows(loader(window=window))
    stopped = loader(workers=workers, window=window)
    batches = iter(stopped)
    seen = rows([next(batches) for _ in range(3)])
    state = stopped.state_dict()
    del batches
    resumed = loader(workers=workers, window=window)
    resumed.load_state_dict(state)
    assert len(resumed) == 7
    assert seen + rows(resumed) == whole
    assert rows(resumed) == whole  # without set_epoch a further pass is the whole epoch again
    resumed.order.set_epoch(1)
    assert rows(resumed) != whole


def test_the_position_is_read_when_the_first_batch_is_asked_for():
    source = loader()
    batches = iter(source)
    source.order.set_epoch(1)
    expected = TrainingOrder(13, 2, 0)
    expected.set_epoch(1)
    assert rows(batches) == list(expected)


def test_loaders_leave_the_global_random_stream_alone():
    before = torch.get_rng_state()
    list(loader())
    list(validation_loader(groups(5), ValidationOrder(5, 2), collate))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("other", "change"),
    [
        (lambda: loader(batch_size=3), "global batch size was 2, is 3"),
        (lambda: loader(seed=1), "seed was 0, is 1"),
        (lambda: loader(window=2), "length_window was 1, is 2"),
        (lambda: loader(count=14), "hash of rows and lengths"),
    ],
)
def test_a_changed_order_is_refused_in_the_middle_of_an_epoch_only(other, change):
    source = loader()
    batches = iter(source)
    next(batches)
    with pytest.raises(DataError) as error:
        other().load_state_dict(source.state_dict())
    assert change in str(error.value)
    assert "cannot resume after batch 1 of 7" in str(error.value)
    assert "a checkpoint of the end of an epoch" in str(error.value)
    list(batches)
    changed = other()
    changed.load_state_dict(source.state_dict())
    changed.order.set_epoch(1)
    assert len(rows(changed)) == len(changed)
