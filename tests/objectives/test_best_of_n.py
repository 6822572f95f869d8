from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.objectives.best_of_n import BestOfN, best_of_n_loss, worse_columns
from lit_align.objectives.sft import SFT
from lit_align.settings import OptimSettings, PairSettings
from tests.families import save_tiny
from tests.objectives.contract import ObjectiveContract, random_groups
from tests.objectives.rollouts import moved


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny"))


def others(logps: Tensor) -> Tensor:
    """All columns but the first."""
    found = torch.ones_like(logps, dtype=torch.bool)
    found[:, 0] = False
    return found


class TestBestOfN(ObjectiveContract):
    objective = BestOfN
    columns = 3

    def loss(self, logratio: Tensor) -> Tensor:
        return best_of_n_loss(logratio, others(logratio), negative_coef=0.0, threshold=0.01)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [-1.5, -2.0, -4.0], 1.5


class TestBestOfNWithANegativeGradient(ObjectiveContract):
    objective = BestOfN
    columns = 3

    def build(self, model: str) -> AlignModule:
        optim = OptimSettings(learning_rate=self.learning_rate, warmup=0.0, schedule="constant")
        return BestOfN(negative_coef=0.5, threshold=0.02, pair=PairSettings(model), optim=optim)

    def loss(self, logratio: Tensor) -> Tensor:
        return best_of_n_loss(logratio, others(logratio), negative_coef=0.5, threshold=0.02)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [-1.0, -2.0, -3.0], 1.0 - 1.0 - 1.5
        # e^-3.9 is above 0.02 and e^-4 below
        yield [-1.0, -4.9, -5.0], 1.0 - 2.45
        yield [-6.0, -0.5, -9.0], 6.0 - 0.25 - 4.5


def test_a_completion_below_the_threshold_has_no_gradient_and_the_comparison_none_either() -> None:
    """exp of -1, -4.5 and -6 beside the best, against 0.01 = exp(-4.6)."""
    logps = torch.tensor([[-20.0, -21.0, -24.5, -26.0]], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(best_of_n_loss(logps, others(logps), 0.7, 0.01).sum(), logps)
    assert found.tolist() == [[-1.0, 0.7, 0.7, 0.0]]


def test_a_threshold_on_the_likelihood_itself_bounds_the_loss() -> None:
    """Below e^-4.6 = 0.01 a completion is no longer lowered, whatever the best one has."""
    logps = torch.tensor([[-20.0, -4.5, -4.7, -1.0]], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(best_of_n_loss(logps, others(logps), 0.7, 0.01, relative=False).sum(), logps)
    assert found.tolist() == [[-1.0, 0.7, 0.0, 0.7]]
    drawn = -50 * torch.rand(1000, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert best_of_n_loss(drawn, others(drawn), 1.0, 0.01, relative=False).min() >= 9 * math.log(0.01)


def test_no_threshold_lowers_all_and_a_high_one_only_what_is_likelier_than_the_best() -> None:
    logps = torch.tensor([[-5.0, -300.0, -4.0, -4.9]], dtype=torch.float64, requires_grad=True)
    for threshold, expected in ((0.0, [-1.0, 1.0, 1.0, 1.0]), (1.0, [-1.0, 0.0, 1.0, 1.0]), (2.0, [-1.0, 0, 1.0, 0])):
        (found,) = torch.autograd.grad(best_of_n_loss(logps, others(logps), 1.0, threshold).sum(), logps)
        assert found.tolist() == [expected]


def test_what_is_as_good_as_the_best_is_not_lowered() -> None:
    reward = torch.tensor([[3.0, 3.0, 1.0], [1.0, 1.0, 1.0], [2.0, 0.0, 0.0]])
    present = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])
    expected = [[False, False, True], [False, False, False], [False, True, False]]
    assert worse_columns(reward, present).tolist() == expected
    assert worse_columns(None, present).tolist() == [[False, True, True], [False, True, True], [False, True, False]]
    assert present.all(-1).tolist() == [True, True, False]


@pytest.mark.parametrize("negative_coef", [0.0, 0.7])
def test_groups_without_a_best_completion_are_left_out_and_single_ones_kept(negative_coef: float, model: str) -> None:
    module = moved(BestOfN, model, negative_coef=negative_coef)
    present = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    batch = random_groups(5, 3)
    batch = batch._replace(
        present=present,
        completion_mask=batch.completion_mask & present[..., None],
        reward=torch.tensor([[2.0, 2.0, 1.0], [1.0, 1.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.0]]),
    )
    loss = module.loss(batch)
    assert loss.weight.tolist() == [1, 0, 1, 0, 1]
    assert loss.value.isfinite().all()
    with torch.no_grad():
        s = module.pair.score(batch).logps  # type: ignore[union-attr]
    gap = s - s[:, :1]
    lowered = [s[0, 2] * (gap[0, 2] > math.log(0.01)), 0.0, 0.0, 0.0, s[4, 1] * (gap[4, 1] > math.log(0.01))]
    expected = -s[:, 0] + negative_coef * torch.tensor([float(one) for one in lowered])
    torch.testing.assert_close(loss.value, expected, atol=1e-5, rtol=1e-5)
    (loss.value * loss.weight).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_of_single_completions_it_is_the_likelihood_of_sft_summed_over_tokens(model: str) -> None:
    batch = random_groups(6, 1)
    best, sft = moved(BestOfN, model), moved(SFT, model)
    found, expected = best.loss(batch), sft.loss(batch)
    torch.testing.assert_close(found.value, (expected.value * expected.weight).sum((1, 2)))
    assert (found.weight == 1).all()


def test_a_negative_gradient_needs_others_than_the_best() -> None:
    BestOfN(negative_coef=1.0).check_data(random_groups(3, 2))
    BestOfN().check_data(random_groups(3, 1))
    with pytest.raises(UserError, match=r"no others to lower: set data.select to ranked"):
        BestOfN(negative_coef=1.0).check_data(random_groups(3, 1))


@pytest.mark.parametrize("name", ["negative_coef", "threshold"])
def test_hyperparameters_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is -1"):
        BestOfN(**{name: -1})


def test_the_mean_over_the_others_bounds_the_loss_and_their_sum_does_not() -> None:
    """Lowered together by c, the best adds c and each of the others that still counts takes βc away."""
    logps = -50 * torch.rand(1000, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lowered = (logps[:, 1:] - logps[:, :1] > math.log(0.01)).double().sum(-1)
    for beta in (1.0, 1 / 9):
        value, lower = (best_of_n_loss(one, others(logps), beta, 0.01) for one in (logps, logps - 100))
        assert torch.allclose(lower - value, 100 * (1 - beta * lowered))
    assert best_of_n_loss(logps, others(logps), 1 / 9, 0.01).min() >= math.log(0.01)
    assert best_of_n_loss(logps, others(logps), 1.0, 0.01).min() < -100


def test_the_module_reads_the_threshold_as_it_is_told(model: str) -> None:
    """No text has a probability above 1, and some are likelier than the one that stands first."""
    batch = random_groups(4, 3)
    for relative in (True, False):
        module = moved(BestOfN, model, negative_coef=1.0, threshold=1.0, relative=relative)
        with torch.no_grad():
            logps = module.pair.score(batch, reference=False).logps  # type: ignore[union-attr]
            likelier = logps > logps[:, :1]
            assert likelier.any()
            expected = -logps[:, 0] + relative * (logps * likelier).sum(-1)
            torch.testing.assert_close(module.loss(batch).value, expected)
