from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.exo import EXOPref, EXORw, exo_loss, preference_target, reward_target
from tests.objectives.contract import ObjectiveContract


class TestEXOPref(ObjectiveContract):
    objective = EXOPref

    def loss(self, logratio: Tensor) -> Tensor:
        return exo_loss(logratio, preference_target(len(logratio), 1e-3, logratio), beta=0.5)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        # p = (1/2, 1/2): -ln 2 - (ln 0.999 + ln 0.001) / 2
        yield [0.0, 0.0], -math.log(2) - (math.log(0.999) + math.log(0.001)) / 2
        # p = q where β m = ln 999
        yield [2 * math.log(999), 0.0], 0.0
        # p = (3/4, 1/4)
        yield [2 * math.log(3), 0.0], 0.75 * math.log(0.75 / 0.999) + 0.25 * math.log(0.25 / 0.001)

    def test_worked_values(self) -> None:
        for logratio, expected in self.worked():
            found = self.loss(torch.tensor([logratio], dtype=torch.float64)).item()
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_four_completions_with_rewards_worked_by_hand() -> None:
    reward = torch.tensor([[0.1 * math.log(4), 0.1 * math.log(2), 0.0, 0.0]], dtype=torch.float64)
    present = torch.ones(1, 4, dtype=torch.bool)
    target = reward_target(reward, 0.1, present)
    assert target.exp()[0].tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 8])
    uniform = exo_loss(torch.full((1, 4), 3.0, dtype=torch.float64), target, 0.5)
    # KL(uniform ‖ q) = ln(1/4) - (ln 1/2 + ln 1/4 + 2 ln 1/8) / 4 = (9/4 - 2) ln 2
    assert uniform.item() == pytest.approx(0.25 * math.log(2))


def test_an_absent_column_leaves_the_others_as_if_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logratio, reward = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    alone = exo_loss(logratio, reward_target(reward, 0.1, torch.ones(5, 3, dtype=torch.bool)), 0.5)
    present = torch.tensor([True, True, True, False]).expand(5, 4)
    wider = torch.cat([logratio, torch.full((5, 1), 7.0)], 1).requires_grad_()
    found = exo_loss(wider, reward_target(torch.cat([reward, torch.zeros(5, 1)], 1), 0.1, present), 0.5, present)
    torch.testing.assert_close(found, alone)
    (gradient,) = torch.autograd.grad(found.sum(), wider)
    assert gradient.isfinite().all()
    assert (gradient[:, 3] == 0).all()


class TestEXORw(ObjectiveContract):
    objective = EXORw
    columns = 4

    def loss(self, logratio: Tensor) -> Tensor:
        target = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=logratio.dtype).log().expand(len(logratio), 4)
        return exo_loss(logratio, target, beta=0.5)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [3.0, 3.0, 3.0, 3.0], 0.25 * math.log(2)
        # p = (1/4, 1/2, 1/8, 1/8): the first two terms are (1/4)(-ln 2) + (1/2) ln 2
        yield [2 * math.log(2), 2 * math.log(4), 0.0, 0.0], 0.25 * math.log(2)


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("epsilon", 0.0), ("epsilon", 0.5)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}"):
        EXOPref(**{name: value})
