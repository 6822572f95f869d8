from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.baselines import standardized
from lit_align.batch import Rollout
from lit_align.errors import UserError
from lit_align.objectives.best_of_n import best_of_n_loss
from lit_align.objectives.rest import reward_threshold
from lit_align.objectives.rwr import RWR, rwr_loss, rwr_weight
from lit_align.objectives.sft import sft_loss
from tests.families import save_tiny
from tests.objectives.contract import ObjectiveContract
from tests.objectives.rollouts import (
    REFERENCE,
    REWARD,
    assert_the_buffer_is_what_counts,
    expected_gradient,
    gradient,
    judged,
    moved,
    sequence_logps,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny"))


class TestRWR(ObjectiveContract):
    objective = RWR
    columns = 3

    def loss(self, logratio: Tensor) -> Tensor:
        weight = rwr_weight(torch.tensor([4.0, 0.0, -1.0], dtype=logratio.dtype), beta=1.0, max_weight=20.0)
        return rwr_loss(logratio, weight.expand(len(logratio), 3)).sum(-1)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [-1.0, 0.0, 0.0], 20.0  # e⁴ is more than 20
        yield [-0.5, -2.0, -math.e], 10.0 + 2.0 + 1.0


STANDARDIZED = standardized(REWARD, torch.ones(7, dtype=torch.bool), REWARD)


def normalized(values: Tensor) -> Tensor:
    return values / values.norm()


@pytest.mark.parametrize(("beta", "max_weight"), [(0.4, math.inf), (2.0, math.inf), (0.3, 5.0)])
def test_the_fixed_point_on_completions_of_one_distribution_is_that_times_the_weight(
    beta: float, max_weight: float
) -> None:
    """Over all texts, each as often as the reference writes it: stationary at π ∝ π_ref w, and not beside it."""
    weight = rwr_weight(STANDARDIZED, beta, max_weight)
    drawn = sequence_logps(REFERENCE).exp()
    optimum = drawn * weight / (drawn * weight).sum()

    def loss(logps: Tensor) -> Tensor:
        return (drawn * rwr_loss(logps, weight)).sum()

    # The logits of that policy: after nothing the chance of each first token, after a token that of each second one.
    tables = torch.stack([torch.stack([optimum[1:4].sum(), optimum[4:].sum(), optimum[0]]), optimum[1:4], optimum[4:]])
    torch.testing.assert_close(sequence_logps(tables.log()).exp(), optimum)
    assert gradient(loss, tables.log()).abs().max() < 1e-12
    assert gradient(loss, tables.log() * 1.1).abs().max() > 1e-3
    if max_weight == math.inf:
        # That of the reward under a reverse KL of weight β σ̂, the optimum of reinforcement learning.
        tilted = (sequence_logps(REFERENCE) + REWARD / (beta * REWARD.std())).softmax(-1)
        torch.testing.assert_close(optimum, tilted)


def test_on_the_policys_own_completions_it_is_the_policy_gradient_of_the_weight() -> None:
    weight = rwr_weight(STANDARDIZED, 0.7, 5.0)
    found = expected_gradient(lambda logps, y: rwr_loss(logps, weight[y]), 2)
    torch.testing.assert_close(found, -gradient(lambda logps: (logps.exp() * weight).sum()))


def test_a_low_temperature_imitates_the_best_a_high_one_all_alike() -> None:
    def of_rwr(beta: float) -> Tensor:
        return gradient(lambda logps: rwr_loss(logps, rwr_weight(STANDARDIZED, beta, math.inf)).sum())

    order = REWARD.argsort(descending=True)
    worse = torch.ones(1, 7, dtype=torch.bool)
    best = gradient(lambda logps: best_of_n_loss(logps[order][None], worse, 0.0, 0.01).sum())
    torch.testing.assert_close(normalized(of_rwr(0.02)), normalized(best), atol=1e-9, rtol=0)
    assert (normalized(of_rwr(1.0)) - normalized(best)).abs().max() > 0.01
    everyone = gradient(lambda logps: sft_loss(logps).sum())
    torch.testing.assert_close(of_rwr(1e9), everyone, atol=1e-7, rtol=0)


def test_a_low_temperature_under_the_bound_imitates_all_above_the_mean() -> None:
    weight = rwr_weight(STANDARDIZED, 1e-3, 20.0)
    above = REWARD.gt(REWARD.mean())
    torch.testing.assert_close(weight, 20.0 * above.double(), atol=1e-12, rtol=1e-9)
    assert torch.equal(above, reward_threshold(REWARD, 4 / 7) <= REWARD)  # ReST of the best three of the seven


def test_the_bound_keeps_extreme_rewards_finite() -> None:
    found = rwr_weight(torch.tensor([1e4, -1e4, 0.0]), 0.1, 20.0)
    assert found.tolist() == pytest.approx([20.0, 0.0, 1.0])


def test_annotate_and_loss_are_the_formula_of_scores(model: str) -> None:
    module = moved(RWR, model, beta=0.5, max_weight=3.0)
    batch = judged(6, 3)
    assert batch.reward is not None
    found = module.loss(module.annotate(Rollout(batch)))
    scores = module.pair.score(batch)  # type: ignore[union-attr]
    weight = (2 * (batch.reward - batch.reward.mean()) / batch.reward.std()).exp()
    assert ((weight > 3).sum() > 2) & ((weight < 3).sum() > 2)
    torch.testing.assert_close(found.value, -scores.logps * weight.clamp(max=3), atol=1e-4, rtol=1e-4)
    assert (found.weight == 1).all()
    assert found.stats["bounded"].item() == pytest.approx((weight >= 3).float().mean().item())


def test_only_the_buffer_counts_not_how_it_is_cut(model: str) -> None:
    assert_the_buffer_is_what_counts(moved(RWR, model, beta=0.5, max_weight=3.0))


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("max_weight", 0.0)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}"):
        RWR(**{name: value})
