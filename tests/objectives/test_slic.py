from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.slic import SLiC, slic_loss
from tests.objectives.contract import ObjectiveContract


class TestSLiC(ObjectiveContract):
    objective = SLiC

    def loss(self, logratio: Tensor) -> Tensor:
        return slic_loss(logratio, delta=1.0, lambda_=0.1)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [-5.0, -5.0], 1.5
        yield [-5.0, -5.25], 0.75 + 0.5
        yield [-5.0, -9.0], 0.5
        yield [-9.0, -5.0], 5.0 + 0.9


def test_beyond_the_margin_only_the_likelihood_pulls() -> None:
    logps = torch.tensor([[-5.0, -7.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(slic_loss(logps, 1.0, 0.1).sum(), logps)
    assert gradient.tolist() == [[-0.1, 0.0]]


@pytest.mark.parametrize(("name", "value"), [("delta", -1.0), ("lambda_", -0.5)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}"):
        SLiC(**{name: value})
