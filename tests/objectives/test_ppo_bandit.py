from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives.ppo import clipped_policy_loss
from lit_align.objectives.ppo_bandit import BanditPPO
from lit_align.settings import PairSettings
from tests.families import save_tiny
from tests.objectives.buffers import fresh, padded, train_on
from tests.objectives.contract import ObjectiveContract
from tests.test_pair import plain_logps


def started(tmp_path: Path, seed: int = 1, **options: float) -> BanditPPO:
    module = BanditPPO(pair=PairSettings(save_tiny("llama", tmp_path)), **options)
    module.configure_model()
    disturb(module, seed)
    return module


def disturb(module: BanditPPO, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.05)


class TestBanditPPO(ObjectiveContract):
    """The numbers are log ρ of two completions whose standardized rewards are ±1/√2, as those of any two are."""

    objective = BanditPPO

    def loss(self, logratio: Tensor) -> Tensor:
        advantage = math.sqrt(0.5) * torch.tensor([1.0, -1.0], dtype=logratio.dtype)
        return clipped_policy_loss(logratio.exp(), advantage, 0.2).sum(-1)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        half = math.sqrt(0.5)
        yield [0.0, 0.0], 0.0
        yield [math.log(3), math.log(0.9)], (-1.2 + 0.9) * half
        yield [math.log(0.5), math.log(0.1)], (-0.5 + 0.8) * half

    def test_padding_and_the_cut_into_micro_batches_change_nothing(self, model: str) -> None:
        """A buffer of 10 groups in two steps: whole, cut unevenly, and padded further."""
        rollout = fresh(10, 2)
        expected = train_on(self.build(model), rollout, [6, 4])
        for other, sizes, accumulate in ((rollout, [1, 3, 2, 1, 3], 3), (padded(rollout), [6, 4], 1)):
            self.assert_same_training(train_on(self.build(model), other, sizes, accumulate), expected)


def test_the_first_minibatch_has_the_gradient_of_reinforce(tmp_path: Path) -> None:
    """Eq. 19 of arXiv 2404.14367: the mean over completions of -log π(y) r̄."""
    module = started(tmp_path)
    rollout = fresh(5, 3)
    loss = module.loss(module.annotate(rollout))
    ((loss.value * loss.weight).sum() / loss.weight.sum()).backward()
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    groups = rollout.completions
    pool = groups.reward.flatten().tolist()  # type: ignore[union-attr]
    mean, std = statistics.mean(pool), statistics.stdev(pool)
    logps = plain_logps(module.pair.policy, groups)  # type: ignore[union-attr]
    parts = [-(groups.reward[at].item() - mean) / std * each.sum() for at, each in logps.items()]  # type: ignore[index]
    torch.stack(parts).mean().backward()
    assert loss.stats["ratio"].item() == pytest.approx(1, abs=1e-5)
    for name, parameter in module.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3)
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1e-3


def test_the_ratio_is_that_of_whole_completions(tmp_path: Path) -> None:
    """Moved from one adapter to another, against the model's own forward."""
    module = started(tmp_path)
    rollout = fresh(3, 2)
    groups = rollout.completions
    buffer = module.annotate(rollout)
    old = plain_logps(module.pair.policy, groups)  # type: ignore[union-attr]
    disturb(module, 2)
    new = plain_logps(module.pair.policy, groups)  # type: ignore[union-attr]
    loss = module.loss(buffer)
    assert buffer.advantage is not None
    ratios = []
    for at in old:
        ratio, advantage = (new[at].sum() - old[at].sum()).exp().item(), buffer.advantage[at].item()
        expected = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        assert loss.value[at].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
        ratios.append(ratio)
    assert loss.stats["ratio"].item() == pytest.approx(statistics.mean(ratios), rel=1e-3)
    assert loss.stats["clip_share"].item() == pytest.approx(statistics.mean(abs(r - 1) > 0.2 for r in ratios))
    assert 0 < loss.stats["clip_share"] <= 1


def test_a_group_whose_reward_failed_counts_for_nothing_and_a_far_policy_stays_finite(tmp_path: Path) -> None:
    module = started(tmp_path)
    rollout = fresh(5, 2)
    groups = rollout.completions
    gone = torch.tensor([False, False, True, False, False])[:, None]
    bad = groups._replace(present=groups.present & ~gone, reward=groups.reward.masked_fill(gone, math.nan))  # type: ignore[union-attr]
    found, kept = module.annotate(rollout._replace(completions=bad)), torch.tensor([0, 1, 3, 4])
    alone = module.annotate(rollout.rows(kept))
    torch.testing.assert_close(found.advantage[kept], alone.advantage)  # type: ignore[index]
    assert (module.loss(found).weight[2] == 0).all()
    loss = module.loss(found._replace(old_logps=found.old_logps - 50.0))  # type: ignore[operator]
    (loss.value * loss.weight).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_a_clip_of_0_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.clip is 0.*greater than 0"):
        BanditPPO(clip=0.0)
