"""Fresh completions for the tests of objectives that read a Rollout: random ones, annotated and cut as a buffer is."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from lit_align.batch import Rollout
from lit_align.module import AlignModule
from tests.objectives.contract import SameStart, random_groups


def fresh(count: int, columns: int, seed: int = 0) -> Rollout:
    """Random completions with random rewards, as if just drawn; none of what annotation adds."""
    reward = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed + 4))
    groups = random_groups(count, columns, seed)._replace(reward=reward)
    return Rollout(groups, drawn_at=torch.zeros(count, dtype=torch.int64))


def padded(rollout: Rollout) -> Rollout:
    """The same completions with more padding around prompts and behind completions, of a token that exists."""
    groups = rollout.completions
    pad = torch.nn.functional.pad
    wider = groups._replace(
        prompt_ids=pad(groups.prompt_ids, (3, 2), value=5),
        prompt_mask=pad(groups.prompt_mask, (3, 2)),
        completion_ids=pad(groups.completion_ids, (0, 4), value=6),
        completion_mask=pad(groups.completion_mask, (0, 4)),
    )
    return rollout._replace(completions=wider)


class Buffer(LightningDataModule):
    """Annotates one buffer at the start of each epoch, each rank its own part, and cuts it into micro-batches."""

    def __init__(self, rollout: Rollout, sizes: list[int], passes: int) -> None:
        super().__init__()
        self.rollout, self.sizes, self.passes = rollout, sizes, passes

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        places = torch.arange(sum(self.sizes)).split(self.sizes)[self.trainer.global_rank :: self.trainer.world_size]
        own = self.trainer.lightning_module.annotate(self.rollout.rows(torch.cat(places)))  # type: ignore[operator]
        cuts = torch.arange(len(own.completions.row)).split([len(place) for place in places])
        return DataLoader([own.rows(cut) for cut in cuts] * self.passes, batch_size=None)  # type: ignore[arg-type]

    def train_batches(self, world_size: int = 1) -> int:
        return len(self.sizes) * self.passes // world_size


def train_on(
    module: AlignModule,
    rollout: Rollout,
    sizes: list[int],
    accumulate: int = 1,
    passes: int = 1,
    **trainer: Any,
) -> AlignModule:
    """Train on a buffer with Lightning itself; every epoch annotates the same completions anew."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fixed = {"accelerator": "cpu", "logger": False, "use_distributed_sampler": False, "log_every_n_steps": 1}
    options: dict[str, Any] = {"max_epochs": 1, "reload_dataloaders_every_n_epochs": 1, **fixed, **quiet, **trainer}
    options["callbacks"] = [SameStart(), *options.get("callbacks", [])]
    Trainer(**options, accumulate_grad_batches=accumulate).fit(module, datamodule=Buffer(rollout, sizes, passes))
    return module
