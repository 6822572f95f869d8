from __future__ import annotations

import pytest
import torch

from lit_align.data.collate import Group
from lit_align.data.holdout import distinct_prompts, hold_out
from lit_align.data.rows import DataError


def groups(prompts: list[int]) -> list[Group]:
    one = torch.ones(1, dtype=torch.int32)
    return [
        Group(row, torch.tensor([prompt], dtype=torch.int32), [one, one], None) for row, prompt in enumerate(prompts)
    ]


def rows(some: list[Group]) -> list[int]:
    return [group.row for group in some]


REPEATED = groups([number // 3 for number in range(60)])  # 20 prompts, 3 rows each


@pytest.mark.parametrize(("size", "least"), [(0.1, 6), (7, 7), (1, 1), (0.001, 1)])
def test_no_prompt_is_on_both_sides_and_nothing_is_lost(size, least):
    train, held = hold_out(REPEATED, size, seed=0)
    assert sorted(rows(train) + rows(held)) == list(range(60))
    assert {int(g.prompt_ids) for g in train}.isdisjoint(int(g.prompt_ids) for g in held)
    assert least <= len(held) <= least + 2
    assert rows(train) == sorted(rows(train))


def test_rows_are_counted_however_many_groups_they_give():
    one = torch.ones(1, dtype=torch.int32)
    doubled = [Group(row, torch.tensor([row], dtype=torch.int32), [one], None) for row in range(10) for _ in range(3)]
    for size in (2, 0.2):
        train, held = hold_out(doubled, size, seed=0)
        assert (len(set(rows(train))), len(set(rows(held)))) == (8, 2)
        assert (len(train), len(held)) == (24, 6)


def test_the_choice_depends_on_the_seed_only():
    assert rows(hold_out(REPEATED, 0.2, seed=1)[1]) == rows(hold_out(REPEATED, 0.2, seed=1)[1])
    assert rows(hold_out(REPEATED, 0.2, seed=1)[1]) != rows(hold_out(REPEATED, 0.2, seed=2)[1])
    backwards = hold_out(REPEATED[::-1], 0.2, seed=1)[1]
    assert sorted(rows(backwards)) == rows(hold_out(REPEATED, 0.2, seed=1)[1])


@pytest.mark.parametrize(("prompts", "size"), [([1, 1, 1], 0.1), ([1, 2], 2), ([1, 2], 0.99)])
def test_holding_out_everything_is_an_error_with_a_remedy(prompts, size):
    with pytest.raises(DataError) as error:
        hold_out(groups(prompts), size, seed=0)
    assert f"validation_size={size} would hold out all of {len(prompts)} rows" in str(error.value)
    assert "set it to 0" in str(error.value)


def test_distinct_prompts_are_the_first_of_each():
    assert rows(distinct_prompts(REPEATED, 3)) == [0, 3, 6]
    assert rows(distinct_prompts(REPEATED[:4], 9)) == [0, 3]
