from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.batch import Rollout
from lit_align.errors import UserError
from lit_align.objectives.rest import ReST, rest_loss, reward_threshold
from lit_align.objectives.sft import SFT
from tests.families import save_tiny
from tests.objectives.contract import ObjectiveContract
from tests.objectives.rollouts import assert_the_buffer_is_what_counts, judged, learned, moved


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny"))


class TestReST(ObjectiveContract):
    objective = ReST
    columns = 4

    def loss(self, logratio: Tensor) -> Tensor:
        reward = torch.tensor([4.0, 3.0, 2.0, 1.0])
        return (rest_loss(logratio) * (reward >= reward_threshold(reward, 0.75))).sum(-1)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [-1.5, -2.0, -4.0, -8.0], 1.5
        yield [0.0, -1.0, 0.0, 0.0], 0.0


@pytest.mark.parametrize(
    ("quantile", "expected"),
    [(0.0, 1), (0.09, 1), (0.1, 2), (0.29, 3), (0.3, 4), (0.5, 6), (0.7, 8), (0.75, 8), (0.9, 10), (0.999, 10)],
)
def test_the_threshold_leaves_the_share_below_it(quantile: float, expected: float) -> None:
    pool = torch.arange(1.0, 11.0)[torch.randperm(10, generator=torch.Generator().manual_seed(0))]
    assert reward_threshold(pool, quantile).item() == expected


def test_every_hundredth_is_cut_exactly_in_spite_of_floating_point() -> None:
    pool = torch.arange(100.0)
    assert [reward_threshold(pool, number / 100).item() for number in range(100)] == list(range(100))


def test_ties_with_the_threshold_stay_together() -> None:
    pool = torch.tensor([0.0, 1.0, 1.0, 1.0])
    for quantile, kept in ((0.0, 4), (0.25, 3), (0.75, 3), (0.99, 3)):
        assert (pool >= reward_threshold(pool, quantile)).sum() == kept
    assert reward_threshold(torch.full((5,), 0.1), 0.8) == torch.tensor(0.1)


@pytest.mark.parametrize(("good", "kept"), [(1, 1), (20, 20), (25, 25), (30, 30), (99, 99), (100, 100), (0, 100)])
def test_failures_are_not_learned_from_however_many_there_are(good: int, kept: int) -> None:
    """Rewards of 0 and 1; where all are equal there is nothing to choose by."""
    pool = torch.tensor([1.0] * good + [0.0] * (100 - good))
    assert (pool >= reward_threshold(pool, 0.75)).sum() == kept


def test_no_rewards_at_all_keep_nothing() -> None:
    assert reward_threshold(torch.empty(0), 0.5).item() == math.inf


def test_annotate_and_loss_are_the_formula_of_scores(model: str) -> None:
    module = moved(ReST, model, quantile=0.6)
    batch = judged(5, 4)
    assert batch.reward is not None
    found = module.loss(module.annotate(Rollout(batch)))
    ranks = batch.reward.flatten().argsort().argsort().view(5, 4)
    assert torch.equal(found.weight, (ranks >= 12).float())  # the best 8 of 20
    with torch.no_grad():
        torch.testing.assert_close(found.value, -module.pair.score(batch).logps, atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]


def test_with_nothing_left_out_it_is_the_likelihood_of_sft_summed_over_tokens(model: str) -> None:
    batch = judged(5, 3)
    rest, sft = moved(ReST, model, quantile=0.0), moved(SFT, model)
    value, weight, gradient = learned(rest, [rest.annotate(Rollout(batch))])
    expected = sft.loss(batch)
    total = (expected.value * expected.weight).sum()
    total.backward()
    wanted = torch.cat([p.grad.flatten() for p in sft.parameters() if p.requires_grad and p.grad is not None])
    assert value == pytest.approx(total.item(), rel=1e-6)
    assert weight == 15
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


def test_a_minibatch_none_of_whose_completions_count_has_no_gradient(model: str) -> None:
    module = moved(ReST, model, quantile=0.9)
    batch = judged(4, 2)
    batch = batch._replace(reward=torch.tensor([[0.0, 1.0], [9.0, 2.0], [3.0, 4.0], [0.0, 0.0]]))
    buffer = module.annotate(Rollout(batch))
    value, weight, gradient = learned(module, [buffer.rows(slice(2, 4))])
    assert (value, weight) == (0, 0)
    assert (gradient == 0).all()
    assert learned(module, [buffer])[1] == 1


def test_only_the_buffer_counts_not_how_it_is_cut(model: str) -> None:
    assert_the_buffer_is_what_counts(moved(ReST, model, quantile=0.6))


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_quantile_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=rf"model.quantile is {value}"):
        ReST(quantile=value)
