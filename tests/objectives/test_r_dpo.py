from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.dpo import dpo_loss
from lit_align.objectives.r_dpo import RDPO, r_dpo_loss
from tests.objectives.contract import ObjectiveContract


class TestRDPO(ObjectiveContract):
    objective = RDPO

    def loss(self, logratio: Tensor) -> Tensor:
        return r_dpo_loss(logratio, torch.tensor([[9, 5]]).expand(len(logratio), 2), beta=0.1, alpha=0.05)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [-2.0, 0.0], math.log(2)  # 0.1 · -2 + 0.05 · 4 = 0
        yield [10 * math.log(3) - 2, 0.0], math.log(4 / 3)


def test_the_regularized_reward_is_what_it_fits() -> None:
    """DPO's optimum under r - α|y|: β M = r - α|y| + const, so r's preference is fitted where β M + α|y| equals r."""
    reward, lengths = torch.tensor([[1.5, 0.25]], dtype=torch.float64), torch.tensor([[20, 3]])
    beta, alpha = 0.1, 0.05
    logratio = (reward - alpha * lengths) / beta
    bradley_terry = -torch.log(torch.sigmoid(reward[:, 0] - reward[:, 1]))
    torch.testing.assert_close(r_dpo_loss(logratio, lengths, beta, alpha), bradley_terry)


def test_without_a_charge_it_is_dpo() -> None:
    logratio, lengths = torch.randn(8, 2, dtype=torch.float64), torch.randint(1, 90, (8, 2))
    assert torch.equal(r_dpo_loss(logratio, lengths, 0.3, 0.0), dpo_loss(logratio, 0.3))


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("alpha", -0.1)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}"):
        RDPO(**{name: value})
