"""Best of N, win rates and the length-controlled win rate, against enumeration, closed forms and another optimizer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lit_align.commands.statistics import (
    Candidate,
    best_of,
    best_of_kl,
    compared,
    length_controlled,
    over_prompts,
)


def candidate(name: str, reward: Tensor, tokens: Tensor | None = None) -> Candidate:
    reward = reward.double()
    tokens = torch.ones_like(reward) if tokens is None else tokens.double()
    return Candidate(name, reward, tokens, torch.full_like(reward, 1 / reward.shape[1]))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_of_the_best_over_all_subsets(n: int) -> None:
    reward = normal(0, 2, 5)
    expected = [
        sum(max(subset) for subset in itertools.combinations(row, n)) / math.comb(5, n) for row in reward.tolist()
    ]
    weight = best_of(reward, n)
    assert (weight * reward).sum(1).tolist() == pytest.approx(expected)
    assert weight.sum(1).tolist() == pytest.approx([1, 1])


def test_equal_rewards_share_the_chance_to_be_kept() -> None:
    """Of 3 draws with two best ones each subset of two holds at least one of these."""
    assert best_of(torch.tensor([[1.0, 0.0, 1.0]]), 2).tolist() == [[0.5, 0.0, 0.5]]
    assert best_of(torch.zeros(1, 4), 3).tolist() == [pytest.approx([0.25] * 4)]


def test_the_kl_of_best_of_n_is_that_of_the_largest_of_n_uniform_draws() -> None:
    """Its density is n u^(n-1); the integral of f log f over a fine grid."""
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for n in (2, 16):
        density = n * u ** (n - 1)
        assert best_of_kl(n) == pytest.approx((density * density.log()).mean().item(), abs=1e-4)
    assert best_of_kl(1) == 0


def test_a_win_rate_counts_every_pair_of_answers_and_a_tie_a_half() -> None:
    first = candidate("a", torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[5, 7], [2, 2]]))
    second = candidate("b", torch.tensor([[2.0], [0.0]]), torch.tensor([[4], [3]]))
    found = compared(first, second)
    assert found is not None
    assert (found.prompts, found.ties) == (2, 0.5)
    assert found.win_rate.mean == 0.5
    assert found.longer == 0.5  # (1 + 3) / 2 on one prompt, -1 on the other


def test_the_error_is_taken_over_prompts_not_over_answers() -> None:
    """Answers repeated within a prompt say nothing new."""
    reward = normal(1, 30, 1)
    once, often = (compared(candidate("a", reward.expand(-1, k)), candidate("b", normal(2, 30, 1))) for k in (1, 4))
    assert once is not None
    assert often is not None
    assert once.win_rate == pytest.approx(often.win_rate)
    share = once.win_rate.mean
    assert once.win_rate.standard_error == pytest.approx(math.sqrt(share * (1 - share) / 29))


def test_prompts_without_a_reward_are_left_out() -> None:
    reward = torch.tensor([[1.0], [math.nan], [0.0]])
    found = compared(candidate("a", reward), candidate("b", torch.full((3, 1), 0.5)))
    assert found is not None
    assert (found.prompts, found.win_rate.mean) == (2, 0.5)
    assert compared(candidate("a", torch.full((3, 1), math.nan)), candidate("b", reward)) is None


def test_swapping_two_candidates_gives_the_complement() -> None:
    first = candidate("a", normal(3, 40, 2) + 0.4, normal(4, 40, 2) * 9 + 30)
    second = candidate("b", normal(5, 40, 3), normal(6, 40, 3) * 9 + 25)
    one, other = compared(first, second), compared(second, first)
    assert one is not None
    assert other is not None
    assert one.win_rate.mean + other.win_rate.mean == pytest.approx(1)
    assert one.length_controlled is not None
    assert other.length_controlled is not None
    assert one.length_controlled.mean + other.length_controlled.mean == pytest.approx(1)
    assert one.length_controlled.standard_error == pytest.approx(other.length_controlled.standard_error)


def test_a_candidate_against_itself_is_even() -> None:
    one = candidate("a", normal(3, 40, 1), normal(4, 40, 1))
    found = compared(one, one)
    assert found is not None
    assert found.length_controlled is not None
    assert found.length_controlled == pytest.approx((0.5, 0), abs=1e-9)


def penalised(outcome: Tensor, longer: Tensor, weight: Tensor) -> Tensor:
    """The same maximum by gradient ascent on log-likelihood + ½ log det of the information."""
    mean = (longer * weight).sum() / weight.sum()
    x = torch.tanh(longer / ((longer - mean) ** 2 * weight).sum().div(weight.sum()).sqrt()).flatten()
    design = torch.stack([torch.ones_like(x), x], 1)
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def lost() -> Tensor:
        search.zero_grad()
        p = torch.sigmoid(design @ theta)
        likelihood = outcome.flatten() * p.log() + (1 - outcome.flatten()) * (1 - p).log()
        information = design.T @ ((weight.flatten() * p * (1 - p))[:, None] * design)
        value = -(weight.flatten() * likelihood).sum() - 0.5 * torch.logdet(information)
        value.backward()
        return value

    search.step(lost)
    return torch.sigmoid(theta[0].detach())


@pytest.mark.parametrize("pairs", [1, 3])
def test_the_length_controlled_rate_is_the_mode_under_jeffreys_prior(pairs: int) -> None:
    longer = normal(7, 25, pairs) * 10 + 6
    outcome = ((normal(8, 25, pairs) + 0.08 * longer).sign() + 1) / 2
    weight = torch.full_like(longer, 1 / pairs)
    found = length_controlled(outcome, longer, weight)
    assert found is not None
    assert found.mean == pytest.approx(penalised(outcome, longer, weight).item(), abs=1e-6)
    assert found.mean < outcome.mean()


def test_it_recovers_the_rate_at_equal_length_where_length_pays() -> None:
    longer = normal(9, 20_000, 1) * 10 + 8
    spread = longer.std(correction=0)
    chance = torch.sigmoid(-0.5 + 1.5 * torch.tanh(longer / spread))
    outcome = (torch.rand(chance.shape, generator=torch.Generator().manual_seed(1)) < chance).double()
    found = length_controlled(outcome, longer, torch.ones_like(longer))
    assert found is not None
    assert found.standard_error is not None
    truth = torch.sigmoid(torch.tensor(-0.5)).item()
    assert abs(found.mean - truth) < 3 * found.standard_error
    assert outcome.mean() > truth + 10 * found.standard_error


def test_its_error_is_the_spread_of_repeated_experiments() -> None:
    rates, errors = [], []
    for seed in range(200):
        longer = normal(2 * seed + 100, 60, 4) * 10 + 3
        effect = 2 * normal(2 * seed + 101, 60, 1)  # shared by the answers to a prompt
        chance = torch.sigmoid(0.4 + effect + torch.tanh(longer / 10))
        draw = torch.rand(chance.shape, generator=torch.Generator().manual_seed(seed))
        found = length_controlled((draw < chance).double(), longer, torch.full_like(longer, 0.25))
        assert found is not None
        rates.append(found.mean)
        errors.append(found.standard_error or 0.0)
    assert torch.tensor(errors).mean().item() == pytest.approx(torch.tensor(rates).std().item(), rel=0.15)


@pytest.mark.parametrize("n", [3, 10, 50])
def test_a_win_everywhere_leaves_room_for_doubt(n: int) -> None:
    """With equal lengths the mode under Jeffreys' prior is (n + ½) / (n + 1)."""
    first, second = candidate("a", torch.ones(n, 1)), candidate("b", torch.zeros(n, 1))
    found = compared(first, second)
    assert found is not None
    guess = (n + 0.5) / (n + 1)
    assert found.win_rate.mean == 1
    assert found.win_rate.standard_error == pytest.approx(math.sqrt(guess * (1 - guess) / n))
    assert found.length_controlled is not None
    assert found.length_controlled.mean == pytest.approx(guess)
    assert found.length_controlled.standard_error == pytest.approx(math.sqrt(guess * (1 - guess) / n))


def test_where_length_alone_tells_the_winner_it_is_still_finite() -> None:
    longer = torch.tensor([[-3.0], [-2.0], [-1.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    found = length_controlled((longer > 0).double(), longer, torch.ones_like(longer))
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert math.isfinite(found.standard_error or math.nan)


@pytest.mark.parametrize("longer", [[[4.0], [4.0], [4.0], [4.0]], [[1.0], [2.0]]])
def test_what_cannot_be_told_is_not_told(longer: list[list[float]]) -> None:
    values = torch.tensor(longer, dtype=torch.float64)
    assert length_controlled(torch.ones_like(values) / 2, values, torch.ones_like(values)) is None


def test_one_prompt_has_no_error() -> None:
    assert over_prompts(torch.tensor([0.25])) == (0.25, None)
    assert f"{over_prompts(torch.tensor([0.25])):.2f}" == "0.25"
