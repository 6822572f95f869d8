from __future__ import annotations

import itertools

import pytest
import torch

from lit_align.data.collate import Group, collate
from lit_align.data.loader import ResumableLoader, TrainingOrder, ValidationOrder, training_batches, validation_loader
from lit_align.data.rows import DataError


def groups(count: int) -> list[Group]:
    one = torch.ones(1, dtype=torch.int32)
    return [Group(row, one, [one, one], None) for row in range(count)]


def loader(count: int = 13, batch_size: int = 2, seed: int = 0, workers: int = 0) -> ResumableLoader:
    return ResumableLoader(groups(count), TrainingOrder(count, batch_size, seed), collate, workers)


def rows(batches) -> list[list[int]]:
    return [batch.row.tolist() for batch in batches]


SHAPES = list(itertools.product([1, 2, 5, 12, 13, 16, 17], [1, 2, 3, 8], [1, 2, 3]))


@pytest.mark.parametrize(("count", "batch_size", "world_size"), [s for s in SHAPES if s[0] >= s[2]])
def test_every_epoch_shares_the_groups_among_the_ranks(count, batch_size, world_size):
    ranks = [TrainingOrder(count, batch_size, 0, rank, world_size) for rank in range(world_size)]
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


def test_the_global_batches_depend_only_on_the_global_batch_size():
    alone = list(TrainingOrder(21, 4, 5))
    pair = [list(TrainingOrder(21, 2, 5, rank, 2)) for rank in (0, 1)]
    together = [sorted(first + second) for first, second in zip(*pair, strict=True)]
    assert together == [sorted(batch) for batch in alone[: len(together)]]
    assert len(together) == 5  # the 21st group is too few for two ranks


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    order = TrainingOrder(50, 4, seed=3)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    torch.manual_seed(99)
    fresh = TrainingOrder(50, 4, seed=3)
    fresh.set_epoch(1)
    assert list(fresh) == second != first
    fresh.set_epoch(0)
    assert list(fresh) == first
    assert list(TrainingOrder(50, 4, seed=4)) != first
    assert list(TrainingOrder(5, 2, seed=3, shuffle=False)) == [[0, 1], [2, 3], [4]]


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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_continues_where_another_stopped(workers):
    whole = rows(loader())
    stopped = loader(workers=workers)
    batches = iter(stopped)
    seen = rows([next(batches) for _ in range(3)])
    state = stopped.state_dict()
    del batches
    resumed = loader(workers=workers)
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
