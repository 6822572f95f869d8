"""Advantages against their definitions, written as plain sums in Python."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from lit_align.returns import gae, token_rewards, whitened

LENGTHS = [[4, 1, 6], [2, 6, 3]]
MASK = torch.arange(6) < torch.tensor(LENGTHS)[..., None]


def draw(seed: int) -> Tensor:
    """Numbers for every place, padding too."""
    return torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def each() -> list[tuple[int, int, int]]:
    return [(b, k, LENGTHS[b][k]) for b in range(2) for k in range(3)]


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.7), (1.0, 0.95), (0.5, 1.0), (0.8, 0.0)])
def test_advantages_are_the_double_sum_of_their_definition(gamma: float, lam: float) -> None:
    rewards, values = draw(0), draw(1)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for b, k, length in each():
        r, v = rewards[b, k, :length].tolist(), [*values[b, k, :length].tolist(), 0.0]
        error = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected = [sum((gamma * lam) ** (s - t) * error[s] for s in range(t, length)) for t in range(length)]
        assert advantages[b, k, :length].tolist() == pytest.approx(expected)
        assert returns[b, k, :length].tolist() == pytest.approx([a + u for a, u in zip(expected, v, strict=False)])
    assert (advantages[~MASK] == 0).all()
    assert (returns[~MASK] == 0).all()


def test_lambda_1_is_the_discounted_return_less_the_value_and_lambda_0_the_one_step_error() -> None:
    rewards, values = draw(0), draw(1)
    whole, returns = gae(rewards, values, MASK, 0.9, 1.0)
    step, _ = gae(rewards, values, MASK, 0.9, 0.0)
    for b, k, length in each():
        r, v = rewards[b, k, :length].tolist(), [*values[b, k, :length].tolist(), 0.0]
        for t in range(length):
            monte_carlo = sum(0.9 ** (s - t) * r[s] for s in range(t, length))
            assert returns[b, k, t].item() == pytest.approx(monte_carlo)
            assert whole[b, k, t].item() == pytest.approx(monte_carlo - v[t])
            assert step[b, k, t].item() == pytest.approx(r[t] + 0.9 * v[t + 1] - v[t])


def test_padding_before_and_behind_changes_no_advantage() -> None:
    rewards, values = draw(0), draw(1)
    narrow = gae(rewards, values, MASK, 0.9, 0.8)
    places = [torch.nn.functional.pad(field, (2, 3), value=7.0) for field in (rewards, values)]
    wide = gae(*places, torch.nn.functional.pad(MASK, (2, 3)), 0.9, 0.8)
    for small, large in zip(narrow, wide, strict=True):
        assert torch.equal(large[..., 2:-3], small)


def test_a_token_costs_its_log_ratio_and_the_last_one_earns_the_reward() -> None:
    logratio, reward = draw(2), torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 7.0]], dtype=torch.float64)
    found = token_rewards(reward, logratio, MASK, 0.3)
    for b, k, length in each():
        expected = [-0.3 * x for x in logratio[b, k, :length].tolist()]
        expected[-1] += reward[b, k].item()
        assert found[b, k, :length].tolist() == pytest.approx(expected)
        assert (found[b, k, length:] == 0).all()


def test_a_completion_without_tokens_earns_nothing() -> None:
    none = torch.zeros(1, 1, 3, dtype=torch.bool)
    found = token_rewards(torch.ones(1, 1), torch.ones(1, 1, 3), none, 0.3)
    assert (found == 0).all()
    assert all((part == 0).all() for part in gae(found, torch.ones(1, 1, 3), none, 1.0, 1.0))


def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_tokens_alone() -> None:
    advantage = 3 * draw(3) + 5
    found = whitened(advantage, MASK, torch.clone)
    tokens = advantage[MASK].tolist()
    mean, std = statistics.mean(tokens), statistics.stdev(tokens)
    assert found[MASK].tolist() == pytest.approx([(a - mean) / std for a in tokens])
    assert (found[~MASK] == 0).all()


def test_ranks_whiten_as_if_they_were_one() -> None:
    """Each half, given the sums of both, which the whole computation shows."""
    advantage = draw(3)
    seen: list[Tensor] = []
    whole = whitened(advantage, MASK, lambda x: seen.append(x) or x)  # type: ignore[func-returns-value]
    halves = []
    for b in range(2):
        sums = iter(seen)
        halves.append(whitened(advantage[b : b + 1], MASK[b : b + 1], lambda _, sums=sums: next(sums)))
    torch.testing.assert_close(torch.cat(halves), whole)


def test_equal_advantages_whiten_to_0() -> None:
    found = whitened(torch.full((2, 3, 6), 0.1), MASK, torch.clone)
    assert found.abs().max() < 1e-6
    assert (whitened(draw(3), torch.zeros_like(MASK), torch.clone) == 0).all()
