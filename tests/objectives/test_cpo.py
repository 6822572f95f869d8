from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.cpo import CPO, cpo_loss
from tests.objectives.contract import ObjectiveContract


class TestCPO(ObjectiveContract):
    objective = CPO

    def loss(self, logratio: Tensor) -> Tensor:
        return cpo_loss(logratio, beta=0.1, lambda_=1.0)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [-7.0, -7.0], math.log(2) + 7
        yield [-2.0, -2.0 - 10 * math.log(3)], math.log(4 / 3) + 2


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("lambda_", -1.0)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}"):
        CPO(**{name: value})
