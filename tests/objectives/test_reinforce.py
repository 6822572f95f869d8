from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_align.baselines import leave_one_out, per_prompt, standardized
from lit_align.batch import Rollout
from lit_align.draws import reward_pool
from lit_align.errors import UserError
from lit_align.objectives.reinforce import REINFORCE, reinforce_loss
from tests.families import save_tiny
from tests.objectives import contract
from tests.objectives.contract import ObjectiveContract, random_groups, train
from tests.objectives.rollouts import (
    LOGITS,
    REFERENCE,
    REWARD,
    assert_the_buffer_is_what_counts,
    expected_gradient,
    gradient,
    judged,
    moved,
    sequence_logps,
)

BASELINES = ("batch", "per_prompt", "leave_one_out")


class KeepState(Callback):
    """Writes the adapter of rank 0 to a file, so that another process can read it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save({k: v for k, v in pl_module.state_dict().items() if "lora" in k}, self.path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny"))


class TestREINFORCE(ObjectiveContract):
    objective = REINFORCE
    columns = 3

    def loss(self, logratio: Tensor) -> Tensor:
        advantage = torch.tensor([1.5, -0.5, -1.0], dtype=logratio.dtype)
        return reinforce_loss(logratio, advantage.expand(len(logratio), 3)).sum(-1)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [-1.0, 0.0, 0.0], 1.5
        yield [-2.0, -4.0, -3.0], 3.0 - 2.0 - 3.0


def present(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


POLICY_GRADIENT = gradient(lambda logps: (logps.exp() * REWARD).sum())
"""Of the exact expected reward: a sum over all texts, with no log-derivative in it."""


@pytest.mark.parametrize("size", [2, 3])
def test_leave_one_out_is_unbiased_and_the_group_mean_shrinks_by_its_share(size: int) -> None:
    own = expected_gradient(lambda logps, y: reinforce_loss(logps, leave_one_out(REWARD[y], present(y))), size)
    torch.testing.assert_close(own, -POLICY_GRADIENT)
    shrunk = expected_gradient(lambda logps, y: reinforce_loss(logps, per_prompt(REWARD[y], present(y))), size)
    torch.testing.assert_close(shrunk, -(size - 1) / size * POLICY_GRADIENT)


def test_a_standardized_reward_is_the_policy_gradient_in_deviations() -> None:
    """With the pool of a large buffer, whose mean and deviation no completion of its own moves."""
    pool = REWARD.repeat(3)
    found = expected_gradient(lambda logps, y: reinforce_loss(logps, standardized(REWARD[y], present(y), pool)), 1)
    torch.testing.assert_close(found, -POLICY_GRADIENT / pool.std())


def test_a_buffer_of_two_standardizes_the_reward_to_who_is_better() -> None:
    """r̄ is then ±1/√2: the gradient is that of the chance to beat the policy, less that to be beaten."""

    def by_pair(logps: Tensor, y: Tensor) -> Tensor:
        advantage = torch.cat([standardized(REWARD[one][None], present(one)[None], REWARD[one]) for one in y])
        return reinforce_loss(logps, advantage)

    rival = sequence_logps(LOGITS).exp()
    wins = ((REWARD[:, None] - REWARD).sign() * rival).sum(-1)
    expected = gradient(lambda logps: (logps.exp() * wins).sum()) / math.sqrt(2)
    torch.testing.assert_close(expected_gradient(by_pair, 2), -expected)


def test_a_charge_for_the_log_ratio_is_the_gradient_of_the_reverse_kl() -> None:
    policy, reference = sequence_logps(LOGITS), sequence_logps(REFERENCE)
    charged = REWARD - 0.4 * (policy - reference)
    found = expected_gradient(lambda logps, y: reinforce_loss(logps, leave_one_out(charged[y], present(y))), 2)
    expected = gradient(lambda logps: (logps.exp() * (REWARD - 0.4 * (logps - reference))).sum())
    torch.testing.assert_close(found, -expected)


@pytest.mark.parametrize("options", [*({"baseline": name} for name in BASELINES), {"kl_coef": 0.3}], ids=str)
def test_only_the_buffer_counts_not_how_it_is_cut(options: dict[str, str | float], model: str) -> None:
    assert_the_buffer_is_what_counts(moved(REINFORCE, model, **options))


@pytest.mark.parametrize("baseline", BASELINES)
def test_annotate_charges_the_divergence_of_every_completion_to_its_reward(baseline: str, model: str) -> None:
    """Of more completions than are measured at once."""
    module = moved(REINFORCE, model, baseline=baseline, kl_coef=0.7)
    batch = judged(15, 5)
    found = module.annotate(Rollout(batch)).advantage
    assert found is not None
    assert found.shape == (15, 5, 1)
    assert not found.requires_grad
    with torch.no_grad():
        scores = module.pair.score(batch)  # type: ignore[union-attr]
    assert batch.reward is not None
    assert scores.logratio.abs().min() > 1e-4
    reward = batch.reward - 0.7 * (scores.logps - scores.reference_logps)  # type: ignore[operator]
    expected = {
        "batch": (reward - reward.mean()) / reward.std(),
        "per_prompt": reward - reward.mean(-1, keepdim=True),
        "leave_one_out": (reward - (reward.sum(-1, keepdim=True) - reward) / 4),
    }[baseline]
    torch.testing.assert_close(found[..., 0], expected, atol=1e-4, rtol=1e-4)


def test_the_reward_that_orders_completions_is_not_charged(model: str) -> None:
    batch = judged(3, 2)
    found = moved(REINFORCE, model, kl_coef=0.7).annotate(Rollout(batch)).completions
    assert batch.reward is not None
    assert found.reward is not None
    assert torch.equal(found.reward, batch.reward)


def test_two_ranks_compare_with_the_rewards_of_both(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a dataset's rewards the pool is what all ranks hold, absent columns aside."""

    class Fresh(contract.Groups):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            self.training_rewards = None

    monkeypatch.setattr(contract, "Groups", Fresh)
    folder = tmp_path_factory.mktemp("ranks")
    groups = judged(10, 3)
    groups.present[7, 1:] = False
    groups = groups._replace(completion_mask=groups.completion_mask & groups.present[..., None])
    states = []
    for sizes, ranks in (([10], {}), ([5, 5], {"strategy": "ddp_fork", "devices": 2})):
        module = TestREINFORCE().build(save_tiny("llama", folder))
        keep = KeepState(folder / "state")
        train(module, groups, sizes, 1, callbacks=[keep], **ranks)
        states.append(torch.load(folder / "state"))
    one, two = states
    assert one.keys() == two.keys() != set()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-4)


def test_a_baseline_of_the_prompt_needs_two_completions() -> None:
    batch = random_groups(4, 1)
    REINFORCE().check_data(batch)
    for baseline in ("per_prompt", "leave_one_out"):
        with pytest.raises(UserError, match=f"model.baseline is {baseline}.*data.completions to 2 or more"):
            REINFORCE(baseline=baseline).check_data(batch)
        REINFORCE(baseline=baseline).check_data(random_groups(4, 2))


def test_kl_coef_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.kl_coef is -1"):
        REINFORCE(kl_coef=-1)


def test_rewards_are_gathered_where_the_ranks_can_reach_them() -> None:
    """A fresh buffer waits on the CPU; NCCL takes nothing from there."""
    seen: list[str] = []

    def all_gather(values: Tensor) -> Tensor:
        seen.append(values.device.type)
        return torch.tensor([[0.5, torch.nan], [1.5, 2.5]])

    strategy = SimpleNamespace(root_device=torch.device("meta"), all_gather=all_gather)
    pool = reward_pool(judged(1, 2), SimpleNamespace(world_size=2, strategy=strategy))
    assert seen == ["meta"]
    assert pool.tolist() == [0.5, 1.5, 2.5]


def test_a_charge_is_refused_where_the_rewards_of_a_dataset_are_the_measure(model: str) -> None:
    """They are not charged, so a charged reward beside them says nothing."""
    for fresh, baseline, refused in (
        (False, "batch", True),
        (True, "batch", False),
        (False, "leave_one_out", False),
    ):
        module = moved(REINFORCE, model, baseline=baseline, kl_coef=0.1)
        module.source = SimpleNamespace(fresh=fresh)
        with pytest.raises(UserError, match=r"model\.kl_coef is 0\.1") if refused else nullcontext():
            module.check_data(judged(3, 2))
