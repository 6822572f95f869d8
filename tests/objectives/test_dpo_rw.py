from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.dpo import dpo_loss
from lit_align.objectives.dpo_rw import DPORw, dpo_rw_loss
from tests.objectives.contract import ObjectiveContract

QUARTERS = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()


class TestDPORw(ObjectiveContract):
    objective = DPORw
    columns = 4

    def loss(self, logratio: Tensor) -> Tensor:
        return dpo_rw_loss(logratio, QUARTERS.to(logratio.dtype).expand(len(logratio), 4), beta=0.5)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [1.0, 1.0, 1.0, 1.0], math.log(4)
        # p = q: the entropy of q, (1/2 + 2/4 + 2 · 3/8) ln 2
        yield [2 * math.log(4), 2 * math.log(2), 0.0, 0.0], 1.75 * math.log(2)


def test_on_pairs_with_a_certain_label_it_is_dpo_and_with_a_doubtful_one_cdpo() -> None:
    logratio = 5 * torch.randn(9, 2, dtype=torch.float64)
    for e in (0.0, 0.1, 0.3):
        target = torch.tensor([1 - e, e], dtype=torch.float64).log().expand(9, 2)
        torch.testing.assert_close(dpo_rw_loss(logratio, target, 0.3), dpo_loss(logratio, 0.3, e))


def test_an_absent_column_leaves_the_others_as_if_alone() -> None:
    logratio = torch.randn(5, 3, dtype=torch.float64)
    target = torch.randn(5, 3, dtype=torch.float64).log_softmax(-1)
    wider = torch.cat([logratio, torch.full((5, 1), 9.0)], 1).requires_grad_()
    padded = torch.cat([target, torch.full((5, 1), -math.inf)], 1)
    present = torch.tensor([True, True, True, False]).expand(5, 4)
    found = dpo_rw_loss(wider, padded, 0.5, present)
    torch.testing.assert_close(found, dpo_rw_loss(logratio, target, 0.5))
    (gradient,) = torch.autograd.grad(found.sum(), wider)
    assert gradient.isfinite().all()
    assert (gradient[:, 3] == 0).all()


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("reward_beta", -1.0)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}"):
        DPORw(**{name: value})
