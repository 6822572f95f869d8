from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.spo import SPO, soft_importance, spo_loss
from tests.objectives.contract import ObjectiveContract


class TestSPO(ObjectiveContract):
    objective = SPO

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


@pytest.mark.parametrize(("name", "value", "reason"), [("alpha", 0.0, "no lower bound"), ("alpha", -0.1, "greater")])
def test_alpha_out_of_range_is_refused(name: str, value: float, reason: str) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is .*{reason}"):
        SPO(**{name: value})


def test_gamma_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.gamma is -1"):
        SPO(gamma=-1)
