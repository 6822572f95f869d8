from __future__ import annotations

import torch

from lit_align.data.collate import Group, collate


def group(row: int, prompt: list[int], completions: list[list[int]], rewards: list[float] | None = None) -> Group:
    ids = [torch.tensor(one, dtype=torch.int32) for one in completions]
    return Group(row, torch.tensor(prompt, dtype=torch.int32), ids, rewards)


def test_pads_on_the_right_and_marks_absent_columns():
    batch = collate([group(7, [1, 2, 3], [[4, 9], [5, 6, 9]]), group(2, [8], [[9], [9, 9], [7, 9]])], pad_id=9)
    assert batch.prompt_ids.tolist() == [[1, 2, 3], [8, 9, 9]]
    assert batch.prompt_mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.completion_ids.tolist() == [
        [[4, 9, 9], [5, 6, 9], [9, 9, 9]],
        [[9, 9, 9], [9, 9, 9], [7, 9, 9]],
    ]
    # Masks count tokens, whatever their value: the pad id is a token of these completions too.
    assert batch.lengths.tolist() == [[2, 3, 0], [1, 2, 2]]
    assert batch.completion_mask[1, 1].tolist() == [True, True, False]
    assert batch.present.tolist() == [[True, True, False], [True, True, True]]
    assert batch.row.tolist() == [7, 2]
    assert batch.reward is None
    assert {batch.prompt_ids.dtype, batch.completion_ids.dtype, batch.row.dtype} == {torch.int64}
    assert {batch.prompt_mask.dtype, batch.completion_mask.dtype, batch.present.dtype} == {torch.bool}


def test_rewards_are_kept_where_every_group_has_them():
    scored = group(0, [1], [[2], [3]], [1.5, -0.5])
    longer = group(1, [1], [[2], [3], [4]], [3.0, 2.0, 1.0])
    reward = collate([scored, longer]).reward
    assert reward is not None
    assert reward.dtype == torch.float32
    assert reward.tolist() == [[1.5, -0.5, 0.0], [3.0, 2.0, 1.0]]
    assert collate([scored, group(1, [1], [[2], [3]])]).reward is None
