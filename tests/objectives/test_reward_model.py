from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from lit_align.batch import CompletionBatch
from lit_align.errors import UserError
from lit_align.objectives.reward_model import RewardModel, reward_model_loss
from lit_align.settings import OptimSettings, PairSettings
from tests.families import save_tiny
from tests.objectives.contract import Groups, ObjectiveContract, random_groups, same_start, train


def started(model: str, **options: Any) -> RewardModel:
    module = RewardModel(pair=PairSettings(model), **options)
    module.configure_model()
    same_start(module)
    return module


class TestRewardModel(ObjectiveContract):
    """The numbers are rewards; three columns, of which the last two are equally good."""

    objective = RewardModel
    columns = 3

    def loss(self, logratio: Tensor) -> Tensor:
        targets = torch.tensor([[3.0, 1.0, 1.0]]).expand(len(logratio), 3)
        return reward_model_loss(logratio, targets, torch.ones_like(targets).bool(), center_coefficient=0.01)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [0.0, 0.0, 0.0], math.log(2)
        # differences ± ln 3, so σ = 3/4 and 1/4; sums 2 ∓ ln 3
        a = math.log(3)
        yield [1.0, 1.0 - a, 1.0 + a], (math.log(4 / 3) + math.log(4) + 0.01 * ((2 - a) ** 2 + (2 + a) ** 2)) / 2
        yield [0.0, -a, -a], math.log(4 / 3) + 0.01 * a * a

    def test_steps_raise_the_margin(self, model: str) -> None:
        """There is no log-ratio: the predicted margin must rise."""
        groups = self.groups(6)
        module = train(self.build(model), groups, [6], accumulate=1, max_epochs=2)
        assert isinstance(module, RewardModel)
        after, before = (each.rewards(groups) for each in (module, started(model)))
        assert ((after[:, 0] - after[:, -1]) - (before[:, 0] - before[:, -1])).mean() > 1e-3


def test_a_pair_is_compared_as_bradley_and_terry_do() -> None:
    rewards = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = reward_model_loss(rewards, targets, torch.ones(2, 2).bool())
    assert found.tolist() == pytest.approx([math.log(4 / 3), math.log(4)])
    swapped = reward_model_loss(rewards, targets.flip(1), torch.ones(2, 2).bool())
    assert swapped.tolist() == pytest.approx([math.log(4), math.log(4 / 3)])


def test_each_ordered_pair_counts_the_same_and_columns_may_stand_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, targets = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = []
    for r, t in zip(rewards.tolist(), targets.tolist(), strict=True):
        pairs = [(r[i], r[j]) for i in range(4) for j in range(4) if t[i] > t[j]]
        expected.append(sum(math.log1p(math.exp(low - high)) + 0.5 * (low + high) ** 2 for high, low in pairs) / 6)
    found = reward_model_loss(rewards, targets, torch.ones(5, 4).bool(), center_coefficient=0.5)
    assert found.tolist() == pytest.approx(expected)


def test_an_absent_column_counts_for_nothing() -> None:
    rewards = torch.tensor([[0.3, -0.2, float("inf")]], requires_grad=True)
    found = reward_model_loss(rewards, torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[True, True, False]]))
    assert found.item() == pytest.approx(math.log1p(math.exp(-0.5)))


def test_groups_of_equal_rewards_weigh_nothing_and_groups_without_rewards_follow_their_columns(tmp_path: Path) -> None:
    module = started(save_tiny("llama", tmp_path))
    groups = random_groups(3, 3)
    scored = groups._replace(reward=torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [5.0, 5.0, 0.0]]))
    loss = module.loss(scored)
    assert loss.weight.tolist() == [0.0, 1.0, 1.0]
    assert loss.value[0] == 0
    by_column = module.loss(groups)
    assert by_column.weight.tolist() == [1.0, 1.0, 1.0]
    assert by_column.value[1] == loss.value[1]
    assert loss.implicit_reward is not None
    assert not loss.implicit_reward.requires_grad


def test_the_reward_is_linear_in_the_state_after_the_last_token(tmp_path: Path) -> None:
    """Of the model's own forward, one unpadded row each; the prompt's and earlier tokens' states do not enter."""
    module = started(save_tiny("llama", tmp_path))
    assert module.pair is not None
    assert module.head is not None
    groups = random_groups(3, 2)
    found = module.rewards(groups)
    for b in range(3):
        for k in range(2):
            completion = groups.completion_ids[b, k][groups.completion_mask[b, k]]
            ids = torch.cat([groups.prompt_ids[b][groups.prompt_mask[b]], completion])
            states = module.pair.policy(input_ids=ids[None], output_hidden_states=True).hidden_states[-1]
            torch.testing.assert_close(found[b, k], states[0, -1] @ module.head.weight[0], atol=1e-5, rtol=1e-5)


def test_the_metrics_read_the_best_and_the_worst_present_completion(tmp_path: Path) -> None:
    module = started(save_tiny("llama", tmp_path))
    groups = random_groups(3, 3)
    present = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    groups = groups._replace(present=present, completion_mask=groups.completion_mask & present[..., None])
    rewards = module.rewards(groups).detach()
    module.validation_step(groups, 0)
    found = module.monitor.validation.compute()
    margins = [(rewards[b, 0] - rewards[b, last]).item() for b, last in ((0, 2), (1, 1), (2, 2))]
    assert found["val/rewards/margins"].item() == pytest.approx(sum(margins) / 3, rel=1e-4)
    assert found["val/rewards/accuracies"].item() == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    assert not [name for name in found if "logps" in name or "kl" in name]


class Validated(Groups):
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts, batch_size=None)  # type: ignore[arg-type]


def fit(module: RewardModel, groups: CompletionBatch, ckpt_path: str | None = None, **options: Any) -> RewardModel:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "log_every_n_steps": 1}
    trainer = Trainer(accelerator="cpu", **{"max_epochs": 1, "enable_checkpointing": False, **quiet, **options})
    trainer.fit(module, datamodule=Validated(groups, [2, 2]), ckpt_path=ckpt_path)
    return module


def test_saving_writes_adapter_head_and_the_scale_of_the_validation_rewards(tmp_path: Path) -> None:
    groups = random_groups(4, 2)
    module = fit(RewardModel(pair=PairSettings(save_tiny("llama", tmp_path / "base"))), groups)
    module.save(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "reward_head.safetensors", "reward.json"} <= names
    assert module.head is not None
    saved = load_file(tmp_path / "adapter" / "reward_head.safetensors")
    assert torch.equal(saved["weight"], module.head.weight.data)
    about = json.loads((tmp_path / "adapter" / "reward.json").read_text())
    rewards = module.rewards(groups).flatten().tolist()
    mean = sum(rewards) / 8
    assert about["mean"] == pytest.approx(mean, rel=1e-5)
    assert about["std"] == pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in rewards) / 7), rel=1e-5)
    assert (about["model"], about["validation_completions"]) == (str(tmp_path / "base"), 8)


def test_a_checkpoint_holds_the_head_and_gives_it_back(tmp_path: Path) -> None:
    base, groups = save_tiny("llama", tmp_path), random_groups(4, 2)
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", filename="last", save_on_train_epoch_end=True)
    module = fit(RewardModel(pair=PairSettings(base)), groups, callbacks=[saver], enable_checkpointing=True)
    path = tmp_path / "saved" / "last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert {name for name in state if not name.startswith("pair.")} >= {"head.weight"}
    resumed = fit(RewardModel(pair=PairSettings(base)), groups, ckpt_path=str(path))
    assert torch.equal(resumed.rewards(groups), module.rewards(groups))

    del state["head.weight"]
    broken = RewardModel(pair=PairSettings(base))
    broken.configure_model()
    with pytest.raises(UserError, match=r"1 of \d+ trained tensors are missing .* head.weight"):
        broken.on_load_checkpoint({"state_dict": state})


def test_pairs_are_told_apart_by_their_last_token_after_some_steps(tmp_path: Path) -> None:
    groups = random_groups(8, 2)
    ids = groups.completion_ids.clone()
    last = (groups.lengths - 1).unsqueeze(-1)
    ids.scatter_(-1, last, torch.tensor([5, 6]).expand(8, 2)[..., None])
    groups = groups._replace(completion_ids=ids)
    optim = OptimSettings(learning_rate=1e-2, warmup=0.0, schedule="constant")
    module = RewardModel(pair=PairSettings(save_tiny("llama", tmp_path)), optim=optim)
    train(module, groups, [8], 1, max_epochs=20)
    rewards = module.rewards(groups)
    assert (rewards[:, 0] > rewards[:, 1]).all()


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_coefficient_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"model.center_coefficient is .* 0 or more"):
        RewardModel(center_coefficient=value)
