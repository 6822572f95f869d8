from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.objectives.beta_dpo import BetaDPO, batch_beta, keep_probability
from lit_align.objectives.dpo import DPO, dpo_loss
from lit_align.settings import OptimSettings, PairSettings
from tests.families import save_tiny
from tests.objectives.contract import ObjectiveContract, random_groups, train


class TestBetaDPO(ObjectiveContract):
    """Its selection and β_b belong to the micro-batch: the cut is tested with both off, the running state with all."""

    objective = BetaDPO

    def loss(self, logratio: Tensor) -> Tensor:
        beta = batch_beta(torch.tensor(4.0), torch.tensor(1.5), beta=0.1, a=0.6)  # 0.1 (1 + 0.6 · 2.5) = 0.25
        return dpo_loss(logratio, beta.to(logratio.dtype))

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [1.0, 1.0], math.log(2)
        yield [4 * math.log(3), 0.0], pytest.approx(math.log(4 / 3), rel=1e-6)  # type: ignore[misc]

    def test_worked_values(self) -> None:
        for logratio, expected in self.worked():
            assert self.loss(torch.tensor([logratio], dtype=torch.float64)).item() == expected

    def build(self, model: str) -> AlignModule:
        optim = OptimSettings(learning_rate=1e-3, warmup=0.0, schedule="constant")
        return BetaDPO(a=0.0, keep=1.0, pair=PairSettings(model), optim=optim)


def test_without_guidance_it_is_dpo(tmp_path: Path) -> None:
    model, groups = save_tiny("llama", tmp_path), random_groups(8, 2)
    optim = OptimSettings(learning_rate=1e-2, warmup=0.0, schedule="constant")
    plain = train(DPO(beta=0.3, pair=PairSettings(model), optim=optim), groups, [4, 4], 1)
    ours = train(BetaDPO(beta=0.3, a=0.0, keep=1.0, pair=PairSettings(model), optim=optim), groups, [4, 4], 1)
    for (name, p), (_, q) in zip(plain.pair.named_parameters(), ours.pair.named_parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(p, q, msg=name, atol=1e-6, rtol=1e-5)


def test_a_batch_below_the_running_mean_never_falls_under_the_least_beta() -> None:
    assert batch_beta(torch.tensor(-50.0), torch.tensor(0.0), beta=0.1, a=0.6).item() == pytest.approx(1e-3)


def test_pairs_near_the_running_mean_are_likelier_to_stay() -> None:
    gap = torch.tensor([1.0, 3.0, -1.0, 5.0])
    found = keep_probability(gap, torch.tensor(1.0), torch.tensor(2.0))
    assert found.tolist() == pytest.approx([1.0, math.exp(-0.5), math.exp(-0.5), math.exp(-2)])
    assert keep_probability(gap, torch.tensor(1.0), torch.tensor(0.0)).tolist() == [1.0] * 4


def test_running_moments_follow_all_pairs_of_each_optimizer_step(tmp_path: Path) -> None:
    optim = OptimSettings(learning_rate=1e-2, warmup=0.0, schedule="constant")
    module = BetaDPO(pair=PairSettings(save_tiny("llama", tmp_path)), optim=optim)
    gaps: list[list[float]] = []
    original = module.loss

    def watched(batch):  # type: ignore[no-untyped-def]
        loss = original(batch)
        logratio = module._scores.logratio.detach().double()  # type: ignore[union-attr]
        gaps.append((logratio[:, 0] - logratio[:, 1]).tolist())
        assert loss.weight.sum() == max(1, round(0.8 * len(batch.row)))
        return loss

    module.loss = watched  # type: ignore[method-assign]
    train(module, random_groups(22, 2), [5, 3, 8, 6], 2)
    mean = square = share = 0.0
    for step in (gaps[0] + gaps[1], gaps[2] + gaps[3]):
        mean = 0.9 * mean + 0.1 * sum(step) / len(step)
        square = 0.9 * square + 0.1 * sum(g * g for g in step) / len(step)
        share = 0.9 * share + 0.1
    found_mean, found_deviation = module.moments()
    assert found_mean.item() == pytest.approx(mean / share)
    assert found_deviation.item() == pytest.approx(math.sqrt(square / share - (mean / share) ** 2))


@pytest.mark.parametrize(
    ("name", "value"), [("beta", 0.0), ("a", -1.0), ("keep", 0.0), ("keep", 1.5), ("momentum", 1.0)]
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}"):
        BetaDPO(**{name: value})
