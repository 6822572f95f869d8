"""SPO's preference term, and what the regularizer does to its fixed point."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.objectives.spo import SPO, samples_kl, soft_importance, spo_loss
from lit_align.settings import PairSettings
from tests.objectives.beside import OPTIM
from tests.objectives.contract import ObjectiveContract


class TestSPO(ObjectiveContract):
    """The preference term, which needs pairs only."""

    objective = SPO

    def build(self, model: str) -> AlignModule:
        return SPO(beta=0.0, pair=PairSettings(model), optim=OPTIM)

    def loss(self, logratio: Tensor) -> Tensor:
        return spo_loss(logratio, alpha=0.01)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [-3.0, -3.0], 100 * math.log(2)
        yield [0.0, -100 * math.log(3)], 100 * math.log(4 / 3)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_fixed_point_on_a_tabular_policy_is_the_softmax_of_the_reward(alpha: float, weighted: bool) -> None:
    """Under Bradley-Terry preferences of all pairs, the expected loss is stationary exactly at softmax(r/α).

    Theorems 1 and 2 of arXiv 2405.00747: with any constant weights, here those of SoftImportance.
    """
    reward = torch.tensor([0.3, -0.8, 1.1, 0.0, 0.5], dtype=torch.float64)

    def gradient(logits: Tensor) -> Tensor:
        logits = logits.clone().requires_grad_()
        logps = logits.log_softmax(-1)
        i, j = torch.combinations(torch.arange(5), 2).unbind(1)
        both = torch.stack([logps[i], logps[j]], 1)
        weight = soft_importance(both, 0.7, torch.tensor(-0.2)) if weighted else 1.0
        preferred = torch.sigmoid(reward[i] - reward[j])
        loss = preferred * spo_loss(both, alpha, weight) + (1 - preferred) * spo_loss(both.flip(1), alpha, weight)
        (found,) = torch.autograd.grad(loss.sum(), logits)
        return found

    assert gradient(reward / alpha).abs().max() < 1e-12
    assert gradient(reward / (1.1 * alpha)).abs().max() > 1e-4


def test_the_loss_at_alpha_zero_is_the_limit_of_the_gradient() -> None:
    logps = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    (limit,) = torch.autograd.grad(spo_loss(logps, 0.0).sum(), logps)
    (near,) = torch.autograd.grad(spo_loss(logps, 1e-9).sum(), logps)
    torch.testing.assert_close(limit, near, atol=1e-8, rtol=0)
    assert limit.tolist() == [[-0.5, 0.5]] * 6


def test_soft_importance_worked_by_hand() -> None:
    logps = torch.tensor([[math.log(0.2), math.log(0.1)], [math.log(0.02), math.log(0.01)]], dtype=torch.float64)
    center = torch.tensor((math.log(0.3) + math.log(0.03)) / 2)
    # γ = 2: 2 log 0.3 - 2 c = log 10, and the other way round; σ(± ln 10) = 10/11, 1/11
    found = soft_importance(logps.requires_grad_(), 2.0, 2 * center)
    assert found.tolist() == pytest.approx([10 / 11, 1 / 11])
    assert not found.requires_grad
    assert soft_importance(logps, 0.0, center).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_hyperparameters_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is -0.1.*0 or more"):
        SPO(**{name: -0.1})


def test_a_loss_without_lower_bound_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.alpha and model.beta are 0.*no lower bound"):
        SPO(alpha=0, beta=0)
    assert SPO(alpha=0, beta=0.01).alpha == 0


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.3), (2.0, 0.05), (0.0, 1.0)])
def test_the_regularizer_moves_the_fixed_point_as_the_algebra_says(alpha: float, beta: float) -> None:
    """Stationary where β π_i (log π_i/π_ref,i - KL) = Σ_j μ_ij (P(i > j) - σ(α (log π_i - log π_j))) for every i.

    So for any π the reference log π_ref,i = log π_i - g_i / (β π_i) - c, with g the right side, makes π the fixed
    point; c normalizes it and is the KL, since the g_i add up to 0.
    """
    generator = torch.Generator().manual_seed(3)
    logps = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    reward = torch.tensor([0.3, -0.8, 1.1, 0.0, 0.5], dtype=torch.float64)
    mu = torch.sigmoid(0.7 * torch.logaddexp(logps[:, None], logps))
    drive = mu * (torch.sigmoid(reward[:, None] - reward) - torch.sigmoid(alpha * (logps[:, None] - logps)))
    reference = (logps - drive.sum(1) / (beta * logps.exp())).log_softmax(-1)

    def gradient(beta: float) -> Tensor:
        logits = logps.clone().requires_grad_()
        log_p = logits.log_softmax(-1)
        i, j = torch.combinations(torch.arange(5), 2).unbind(1)
        both = torch.stack([log_p[i], log_p[j]], 1)
        preferred, weight = torch.sigmoid(reward[i] - reward[j]), soft_importance(both, 0.7, torch.tensor(0.0))
        loss = preferred * spo_loss(both, alpha, weight) + (1 - preferred) * spo_loss(both.flip(1), alpha, weight)
        kl = samples_kl((log_p.exp() * (log_p - reference)).sum().view(1, 1, 1))
        (found,) = torch.autograd.grad(loss.sum() + beta * kl, logits)
        return found

    assert gradient(beta).abs().max() < 1e-12
    assert gradient(1.1 * beta).abs().max() > 1e-3
