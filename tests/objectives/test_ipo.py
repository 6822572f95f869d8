from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.ipo import IPO, ipo_loss
from lit_align.settings import PairSettings
from tests.families import save_tiny
from tests.objectives.contract import ObjectiveContract, random_groups


class TestIPO(ObjectiveContract):
    objective = IPO

    def loss(self, logratio: Tensor) -> Tensor:
        return ipo_loss(logratio, tau=0.1)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [0.0, 0.0], 25.0  # 1/(2τ) = 5
        yield [4.0, -1.0], 0.0
        yield [3.0, -5.0], 9.0
        yield [-5.0, 3.0], 169.0


def test_the_tabular_optimum_is_the_target_margin() -> None:
    """Descending the loss on a free margin ends at 1/(2τ) from both sides."""
    for start in (-3.0, 30.0):
        logratio = torch.tensor([[start, 0.0]], dtype=torch.float64, requires_grad=True)
        for _ in range(200):
            (gradient,) = torch.autograd.grad(ipo_loss(logratio, tau=0.05).sum(), logratio)
            logratio = (logratio - 0.1 * gradient).detach().requires_grad_()
        assert (logratio[0, 0] - logratio[0, 1]).item() == pytest.approx(10.0)


def test_length_average_aims_at_nats_a_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    module = IPO(tau=0.25, length_average=True, pair=PairSettings(save_tiny("llama", tmp_path_factory.mktemp("m"))))
    module.configure_model()
    groups = random_groups(4, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
        scores = module.pair.score(groups)  # type: ignore[union-attr]
        per_token = scores.logratio / groups.completion_mask.sum(-1)
        expected = (per_token[:, 0] - per_token[:, 1] - 2.0) ** 2
        torch.testing.assert_close(module.loss(groups).value, expected)
    assert not torch.allclose(expected, (scores.logratio[:, 0] - scores.logratio[:, 1] - 2.0) ** 2)


def test_a_group_counts_as_all_its_pairs(tmp_path: Path) -> None:
    """The same as each better and worse completion as a group of two; equal rewards and absent columns are no pair."""
    module = IPO(tau=0.25, pair=PairSettings(save_tiny("llama", tmp_path)))
    module.configure_model()
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0, 0.1)
    groups = random_groups(3, 4)
    present = torch.tensor([[True] * 4, [True, True, True, False], [True] * 4])
    reward = torch.tensor([[4.0, 3, 2, 1], [2.0, 2, 1, 0], [1.0, 1, 1, 1]])
    mask = groups.completion_mask & present[..., None]
    groups = groups._replace(reward=reward, present=present, completion_mask=mask)
    wanted = {0: combinations(range(4), 2), 1: [(0, 2), (1, 2)], 2: []}
    with torch.no_grad():
        logratio = module.pair.score(groups).logratio  # type: ignore[union-attr]
        found = module.loss(groups)
    pairs = [[(logratio[row, i] - logratio[row, j] - 2) ** 2 for i, j in some] for row, some in wanted.items()]
    assert found.weight.tolist() == [6, 2, 0]
    torch.testing.assert_close(found.value[:2], torch.stack([torch.stack(some).mean() for some in pairs[:2]]))
    assert found.value[2] == 0


@pytest.mark.parametrize("tau", [0.0, -1.0])
def test_tau_out_of_range_is_refused(tau: float) -> None:
    with pytest.raises(UserError, match=r"model.tau is .*greater than 0"):
        IPO(tau=tau)
