from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.simpo import SimPO, simpo_loss
from tests.objectives.contract import ObjectiveContract


class TestSimPO(ObjectiveContract):
    objective = SimPO

    def loss(self, logratio: Tensor) -> Tensor:
        return simpo_loss(logratio, beta=2.0, gamma=1.0)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [-1.0, -1.5], math.log(2)  # 2 · 0.5 - 1 = 0
        # 2 m - 1 = ln 3, so σ = 3/4; and the other way round 2 m - 1 = -ln 3
        yield [0.0, -(1 + math.log(3)) / 2], math.log(4 / 3)
        yield [0.0, -(1 - math.log(3)) / 2], math.log(4)


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("gamma_beta_ratio", -0.1)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}"):
        SimPO(**{name: value})
