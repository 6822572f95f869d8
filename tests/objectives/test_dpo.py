from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.dpo import DPO, dpo_loss
from tests.objectives.contract import ObjectiveContract


class TestDPO(ObjectiveContract):
    objective = DPO

    def loss(self, logratio: Tensor) -> Tensor:
        return dpo_loss(logratio, beta=0.1)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [0.0, 0.0], math.log(2)
        yield [7.5, 7.5], math.log(2)
        # β m = 0.1 · 10 ln 3 = ln 3, so σ = 3/4
        yield [4 * math.log(3), -6 * math.log(3)], math.log(4 / 3)
        yield [-6 * math.log(3), 4 * math.log(3)], math.log(4)


def test_label_smoothing_mixes_the_two_labels() -> None:
    # β m = ln 3: -(3/4) log(3/4) - (1/4) log(1/4), the entropy of (3/4, 1/4), least there among all margins
    loss = dpo_loss(torch.tensor([[math.log(3), 0.0]], dtype=torch.float64), beta=1.0, label_smoothing=0.25)
    assert loss.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_beta_may_differ_between_pairs() -> None:
    logratio = torch.tensor([[1.0, -1.0], [2.0, 0.5]], dtype=torch.float64)
    both = dpo_loss(logratio, beta=torch.tensor([0.3, 0.7], dtype=torch.float64))
    assert both.tolist() == [dpo_loss(logratio[:1], 0.3).item(), dpo_loss(logratio[1:], 0.7).item()]


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_out_of_range_is_refused(beta: float) -> None:
    with pytest.raises(UserError, match=r"model.beta is .*greater than 0"):
        DPO(beta=beta)


@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_out_of_range_is_refused(label_smoothing: float) -> None:
    with pytest.raises(UserError, match=r"label_smoothing is .*\[0, 0.5\)"):
        DPO(label_smoothing=label_smoothing)
