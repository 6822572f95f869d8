from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.dpo import dpo_loss
from lit_align.objectives.robust_dpo import RobustDPO, robust_dpo_loss
from tests.objectives.contract import ObjectiveContract


class TestRobustDPO(ObjectiveContract):
    objective = RobustDPO

    def loss(self, logratio: Tensor) -> Tensor:
        return robust_dpo_loss(logratio, beta=0.1, label_smoothing=0.1)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [1.0, 1.0], math.log(2)
        yield [10 * math.log(3), 0.0], (0.9 * math.log(4 / 3) - 0.1 * math.log(4)) / 0.8


def test_its_mean_over_flipped_labels_is_dpo_on_the_true_ones() -> None:
    logratio = torch.randn(16, 2, dtype=torch.float64)
    for flip in (0.0, 0.1, 0.4):
        as_given = robust_dpo_loss(logratio, 0.3, flip)
        flipped = robust_dpo_loss(logratio.flip(-1), 0.3, flip)
        torch.testing.assert_close((1 - flip) * as_given + flip * flipped, dpo_loss(logratio, 0.3))


@pytest.mark.parametrize(("name", "value"), [("beta", -1.0), ("label_smoothing", 0.5)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}"):
        RobustDPO(**{name: value})
