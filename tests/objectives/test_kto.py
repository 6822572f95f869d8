from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.batch import CompletionBatch
from lit_align.errors import UserError
from lit_align.objectives.kto import KTO, kto_loss, reference_point
from tests.objectives.contract import ObjectiveContract


class TestKTO(ObjectiveContract):
    """z belongs to the micro-batch, so the cut into micro-batches is tested with z held at 0 (groups of one)."""

    objective = KTO
    columns = 1

    def loss(self, logratio: Tensor) -> Tensor:
        good = torch.ones(len(logratio), dtype=torch.bool)
        return kto_loss(logratio[:, 0], good, torch.tensor(2.0, dtype=logratio.dtype), beta=0.1)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [2.0], 0.5
        yield [2.0 + 10 * math.log(3)], 0.25
        yield [2.0 - 10 * math.log(3)], 0.75

    def groups(self, count: int) -> CompletionBatch:
        groups = super().groups(count)
        label = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)
        return groups._replace(reward=label[:, None])

    def test_steps_raise_the_margin(self, model: str) -> None:
        from tests.objectives.contract import train

        groups = self.groups(6)
        module = train(self.build(model), groups, [6], accumulate=1, max_epochs=2)
        assert module.pair is not None
        logratio = module.pair.score(groups).logratio[:, 0]
        assert (logratio[::2].mean() - logratio[1::2].mean()) > 1e-4


def test_bad_completions_mirror_good_ones_and_have_their_own_weight() -> None:
    logratio = torch.tensor([-8.0, 1.0, 30.0], dtype=torch.float64)
    z = torch.tensor(1.0, dtype=torch.float64)
    good, bad = (kto_loss(logratio, torch.full((3,), label), z, 0.1, 1.5, 0.5) for label in (True, False))
    torch.testing.assert_close(good / 1.5 + bad / 0.5, torch.ones(3, dtype=torch.float64))
    assert bad[1] == 0.25


def test_the_reference_point_reads_present_columns_and_carries_no_gradient() -> None:
    mismatched = torch.tensor([4.0, -1.0, 100.0], requires_grad=True)
    found = reference_point(mismatched, torch.tensor([True, True, False]))
    assert found.tolist() == [3.0, 2.0]
    assert not found.requires_grad


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("good_weight", 0.0), ("bad_weight", -1.0)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}"):
        KTO(**{name: value})
