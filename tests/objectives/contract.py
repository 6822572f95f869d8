"""What every objective must satisfy, whatever it computes. A test class inherits this and names its objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lit_align.batch import CompletionBatch
from lit_align.module import AlignModule
from lit_align.settings import LoraSettings, OptimSettings, PairSettings
from tests.families import VOCABULARY, save_tiny


def random_groups(count: int, columns: int, seed: int = 0) -> CompletionBatch:
    """Groups of random tokens with unequal prompts and completions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=generator)

    prompts = torch.randint(2, 9, (count, 1), generator=generator)
    lengths = torch.randint(1, 8, (count, columns, 1), generator=generator)
    return CompletionBatch(
        prompt_ids=draw(count, 8),
        prompt_mask=torch.arange(8) < prompts,
        completion_ids=draw(count, columns, 7),
        completion_mask=torch.arange(7) < lengths,
        reward=None,
        present=torch.ones(count, columns, dtype=torch.bool),
        row=torch.arange(count),
    )


class Groups(LightningDataModule):
    """Cuts one batch into micro-batches, in order."""

    def __init__(self, groups: CompletionBatch, sizes: list[int]) -> None:
        super().__init__()
        self.training_rewards = None if groups.reward is None else groups.reward[groups.present]
        self.parts = [groups.rows(slice(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        own = self.parts if trainer is None else self.parts[trainer.global_rank :: trainer.world_size]
        return DataLoader(own, batch_size=None)  # type: ignore[arg-type]

    def train_batches(self, world_size: int = 1) -> int:
        return len(self.parts) // world_size


def same_start(module: AlignModule) -> None:
    """Draw the adapter's first factor, and what an objective adds, from a fixed seed, whatever process it is in."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_A.default" in name or not name.startswith("pair."):
            torch.nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
    for name, parameter in module.named_parameters():
        if "lora_A.reference" in name:
            parameter.data.copy_(module.get_parameter(name.replace("reference", "default")).data)


class SameStart(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, AlignModule)
        same_start(pl_module)


def train(
    module: AlignModule,
    groups: CompletionBatch,
    sizes: list[int],
    accumulate: int,
    ckpt_path: str | None = None,
    same_start: bool = True,
    **trainer: Any,
) -> AlignModule:
    """Train on the micro-batches in order with Lightning itself."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fixed = {"accelerator": "cpu", "logger": False, "use_distributed_sampler": False}
    options: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 1, **fixed, **quiet, **trainer}
    options["callbacks"] = [*([SameStart()] if same_start else []), *options.get("callbacks", [])]
    runner = Trainer(**options, accumulate_grad_batches=accumulate)
    runner.fit(module, datamodule=Groups(groups, sizes), ckpt_path=ckpt_path)
    return module


class ObjectiveContract(ABC):
    """Inherit, name the objective, and give its pure loss and a value worked by hand."""

    objective: ClassVar[type[AlignModule]]
    columns: ClassVar[int] = 2
    learning_rate: ClassVar[float] = 1e-3

    @abstractmethod
    def loss(self, logratio: Tensor) -> Tensor:
        """The pure loss of log-ratios (B, K) at the default hyperparameters."""

    @abstractmethod
    def worked(self) -> Iterator[tuple[list[float], float]]:
        """Log-ratios of one group and the loss they must give, worked by hand."""

    def build(self, model: str) -> AlignModule:
        """The module with its default hyperparameters on a model."""
        optim = OptimSettings(learning_rate=self.learning_rate, warmup=0.0, schedule="constant")
        lora = LoraSettings(r=4, alpha=8)  # not of full rank, for which the order of summation would be another one
        return self.objective(pair=PairSettings(model, lora=lora), optim=optim)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> str:
        return save_tiny("llama", tmp_path_factory.mktemp("tiny"))

    def groups(self, count: int) -> CompletionBatch:
        """Random groups; with rewards, best first, where the objective reads them.

        They differ less between groups than within one: an objective that compares all of a batch sees the margin.
        """
        groups = random_groups(count, self.columns)
        if not self.objective.needs_reward:
            return groups
        noise = torch.rand(count, self.columns, generator=torch.Generator().manual_seed(4))
        reward = torch.linspace(1, 0, self.columns) + noise / 4
        return groups._replace(reward=reward.sort(descending=True)[0])

    def logratio(self, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return 3 * torch.randn(6, self.columns, generator=generator, dtype=torch.float64).to(dtype)

    def test_worked_values(self) -> None:
        for logratio, expected in self.worked():
            assert self.loss(torch.tensor([logratio], dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-9)

    def test_gradient_agrees_with_finite_differences(self) -> None:
        assert torch.autograd.gradcheck(self.loss, (self.logratio().requires_grad_(),))

    def test_groups_are_independent_of_order_and_shard(self) -> None:
        logratio = self.logratio()
        whole = self.loss(logratio)
        assert whole.shape == (6,)
        torch.testing.assert_close(torch.cat([self.loss(logratio[:2]), self.loss(logratio[2:])]), whole)
        torch.testing.assert_close(self.loss(logratio.flip(0)), whole.flip(0))

    def test_bfloat16_is_near_float32(self) -> None:
        rounded = self.logratio(torch.bfloat16)
        torch.testing.assert_close(self.loss(rounded).float(), self.loss(rounded.float()), rtol=0.05, atol=0.05)

    def test_inputs_are_left_as_they_were(self) -> None:
        logratio = self.logratio()
        before = logratio.clone()
        self.loss(logratio)
        assert torch.equal(logratio, before)

    def test_steps_raise_the_margin(self, model: str) -> None:
        groups = self.groups(6)
        module = train(self.build(model), groups, [6], accumulate=1, max_epochs=2)
        assert module.pair is not None
        logratio = module.pair.score(groups).logratio
        assert (logratio[:, 0] - logratio[:, -1]).mean() > 0.1

    def test_padding_and_the_cut_into_micro_batches_change_nothing(self, model: str) -> None:
        """10 groups in two steps: whole, cut evenly, cut unevenly with a short last step, and padded further."""
        groups = self.groups(10)
        wider = groups._replace(
            prompt_ids=torch.nn.functional.pad(groups.prompt_ids, (3, 2), value=5),
            prompt_mask=torch.nn.functional.pad(groups.prompt_mask, (3, 2)),
            completion_ids=torch.nn.functional.pad(groups.completion_ids, (1, 4), value=6),
            completion_mask=torch.nn.functional.pad(groups.completion_mask, (1, 4)),
        )
        expected = train(self.build(model), groups, [6, 4], 1)
        for batch, sizes, accumulate in (
            (groups, [2, 2, 2, 2, 2], 3),
            (groups, [1, 3, 2, 1, 3], 3),
            (wider, [6, 4], 1),
        ):
            found = train(self.build(model), batch, sizes, accumulate)
            self.assert_same_training(found, expected)

    def assert_same_training(self, found: AlignModule, expected: AlignModule) -> None:
        """Trained parameters and adaptive state agree within rounding."""
        assert expected.pair is not None
        state, wanted = found.state_dict(), expected.state_dict()
        trained = {f"pair.{name}" for name in expected.pair.state_names()}
        moved = 0
        for name in wanted:
            if name in trained or not name.startswith("pair."):
                torch.testing.assert_close(state[name], wanted[name], atol=2e-5, rtol=1e-4, msg=name)
                moved += name in trained and bool(wanted[name].abs().max() > 0)
        assert moved == len(trained)
