from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.orpo import ORPO, log_odds, orpo_loss
from tests.objectives.contract import ObjectiveContract


class TestORPO(ObjectiveContract):
    objective = ORPO

    def loss(self, logratio: Tensor) -> Tensor:
        return orpo_loss(logratio, lambda_=0.1)

    def logratio(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return -super().logratio(dtype).abs() - 0.125

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [math.log(0.5), math.log(0.5)], 1.1 * math.log(2)
        # odds of 3/4 and 1/2 are 3 and 1: σ(ln 3) = 3/4
        yield [math.log(0.75), math.log(0.5)], 1.1 * math.log(4 / 3)
        # odds of 1/10 and 1/4 are 1/9 and 1/3: σ(-ln 3) = 1/4
        yield [math.log(0.1), math.log(0.25)], math.log(10) + 0.1 * math.log(4)


def test_log_odds_keep_their_precision_at_both_ends() -> None:
    logps = torch.tensor([-1e-9, -50.0], dtype=torch.float64, requires_grad=True)
    found = log_odds(logps)
    # 1 - e^-x = x (1 - x/2 + ...) near 0; log(1 - e^-50) = -e^-50 far from it
    assert found.tolist() == pytest.approx([-1e-9 - math.log(1e-9), -50.0 + math.exp(-50)], rel=1e-9)
    (gradient,) = torch.autograd.grad(found.sum(), logps)
    assert gradient.tolist() == pytest.approx([1e9, 1.0], rel=1e-6)  # d/dx [x - log(1 - e^x)] = 1 / (1 - e^x)
    certain = log_odds(torch.zeros(1, requires_grad=True))
    assert certain.isfinite().all()


def test_lambda_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.lambda_ is -1"):
        ORPO(lambda_=-1)
