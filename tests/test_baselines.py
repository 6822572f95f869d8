"""Baselines of rewards, against values worked by hand and identities between them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_align.baselines import leave_one_out, per_prompt, standardized

REWARD = torch.tensor([[4.0, 1.0, 1.0], [2.0, 0.0, 9.0]])
PRESENT = torch.tensor([[True, True, True], [True, True, False]])
POOL = REWARD[PRESENT]


def everywhere(reward: Tensor) -> Tensor:
    return torch.ones_like(reward, dtype=torch.bool)


def test_worked_values() -> None:
    # mean 8/5; the squares (12/5)², (3/5)², (3/5)², (2/5)², (8/5)² sum to 46/5; B - 1 = 4
    deviation = math.sqrt(46 / 20)
    expected = [[2.4, -0.6, -0.6], [0.4, -1.6, 0.0]]
    torch.testing.assert_close(standardized(REWARD, PRESENT, POOL), torch.tensor(expected) / deviation)
    assert per_prompt(REWARD, PRESENT).tolist() == [[2.0, -1.0, -1.0], [1.0, -1.0, 0.0]]
    assert leave_one_out(REWARD, PRESENT).tolist() == [[3.0, -1.5, -1.5], [2.0, -2.0, 0.0]]


def test_two_rewards_are_half_the_root_of_two_apart_whatever_they_are() -> None:
    pair = torch.tensor([[7.0, -3.0]])
    expected = torch.tensor([[1.0, -1.0]]) / math.sqrt(2)
    torch.testing.assert_close(standardized(pair, everywhere(pair), pair.flatten()), expected)


def test_the_standardized_pool_has_mean_zero_and_unit_deviation_and_forgets_scale_and_shift() -> None:
    reward = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = standardized(reward, everywhere(reward), reward.flatten())
    assert found.mean().item() == pytest.approx(0, abs=1e-12)
    assert (found.square().sum() / 31).item() == pytest.approx(1)
    moved = 3 * reward - 100
    torch.testing.assert_close(standardized(moved, everywhere(moved), moved.flatten()), found)


def test_the_group_mean_is_the_others_mean_scaled_and_both_sum_to_zero() -> None:
    reward = torch.randn(50, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own, others = per_prompt(reward, everywhere(reward)), leave_one_out(reward, everywhere(reward))
    torch.testing.assert_close(own, 4 / 5 * others)
    torch.testing.assert_close(others.sum(-1), torch.zeros(50, dtype=torch.float64))


@pytest.mark.parametrize("value", [0.1, -3.7, 1e6 + 0.3])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_rewards_are_worth_nothing_however_their_mean_rounds(value: float, count: int) -> None:
    reward = torch.full((count, 3), value)
    assert (standardized(reward, everywhere(reward), reward.flatten()) == 0).all()
    torch.testing.assert_close(per_prompt(reward, everywhere(reward)), torch.zeros(count, 3), atol=1e-9, rtol=0)
    torch.testing.assert_close(leave_one_out(reward, everywhere(reward)), torch.zeros(count, 3), atol=1e-9, rtol=0)


def test_one_completion_and_an_empty_pool_give_zero() -> None:
    one = torch.tensor([[5.0]])
    for present in (everywhere(one), ~everywhere(one)):
        assert standardized(one, present, one[present]).tolist() == [[0.0]]
        assert per_prompt(one, present).tolist() == [[0.0]]
        assert leave_one_out(one, present).tolist() == [[0.0]]


def test_what_stands_in_absent_columns_is_never_read() -> None:
    for filler in (9.0, math.nan, math.inf):
        reward = REWARD.clone()
        reward[1, 2] = filler
        for found, expected in (
            (standardized(reward, PRESENT, POOL), standardized(REWARD, PRESENT, POOL)),
            (per_prompt(reward, PRESENT), per_prompt(REWARD, PRESENT)),
            (leave_one_out(reward, PRESENT), leave_one_out(REWARD, PRESENT)),
        ):
            assert torch.equal(found, expected)


def test_the_order_of_the_pool_does_not_show_and_no_gradient_goes_through() -> None:
    generator = torch.Generator().manual_seed(2)
    reward = (1e4 + torch.randn(64, 4, generator=generator)).requires_grad_()
    shuffled = reward.detach().flatten()[torch.randperm(256, generator=generator)]
    found = standardized(reward, everywhere(reward), reward.flatten())
    torch.testing.assert_close(standardized(reward, everywhere(reward), shuffled), found, atol=1e-6, rtol=1e-6)
    assert not any(f.requires_grad for f in (found, per_prompt(reward, everywhere(reward))))
