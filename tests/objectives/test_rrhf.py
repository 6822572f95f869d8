from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.rrhf import RRHF, rrhf_loss
from tests.families import save_tiny
from tests.objectives.contract import ObjectiveContract
from tests.objectives.rollouts import judged, moved


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny"))


REWARD = torch.tensor([[3.0, 1.0, 1.0]])


class TestRRHF(ObjectiveContract):
    """Completions of two tokens each, so that log π is twice its mean."""

    objective = RRHF
    columns = 3

    def loss(self, logratio: Tensor) -> Tensor:
        reward = REWARD.expand(len(logratio), 3)
        return rrhf_loss(logratio, 2 * logratio, reward, torch.ones_like(reward).bool(), lambda_=1.0)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [-1.0, -2.0, -3.0], 2.0  # in order: the likelihood alone
        # both worse ones are likelier than the best, by 1 and by 2; the tie between them costs nothing
        yield [-3.0, -2.0, -1.0], 3.0 + 6.0
        yield [-3.0, -4.0, -1.0], 2.0 + 6.0


def test_an_absent_column_counts_for_nothing() -> None:
    mean_logps, reward = torch.tensor([[-3.0, -1.0]]), torch.tensor([[2.0, 0.0]])
    alone = rrhf_loss(mean_logps[:, :1], 2 * mean_logps[:, :1], reward[:, :1], torch.tensor([[True]]), 1.0)
    found = rrhf_loss(mean_logps, 2 * mean_logps, reward, torch.tensor([[True, False]]), 1.0)
    assert torch.equal(found, alone)


def test_lambda_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.lambda_ is -1"):
        RRHF(lambda_=-1)


def test_a_group_without_a_best_completion_is_left_out(model: str) -> None:
    batch = judged(3, 3)
    assert batch.reward is not None
    reward = batch.reward.clone()
    reward[1] = 2.0
    found = moved(RRHF, model).loss(batch._replace(reward=reward))
    assert found.weight.tolist() == [1.0, 0.0, 1.0]
