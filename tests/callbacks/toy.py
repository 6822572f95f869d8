"""A module and data of the shape the callbacks expect, small enough to know every number beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lit_align.batch import CompletionBatch, Rollout, Sampling, Scores

EOS = 0
LETTERS = "?abcdefghij"


class ToyTokenizer:
    """Token i is the i-th letter."""

    eos_token_id = EOS

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(LETTERS[i] for i in ids if i != EOS)

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in rows]

    def save_pretrained(self, directory: str) -> None:
        (Path(directory) / "tokenizer.json").write_text("{}")


class ToyPair(torch.nn.Module):
    """Completion k of prompt p is p's letter, k + 1 times, from the policy followed by the end of sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)
        self.calls: list[tuple[bool, bool, bool]] = []
        self.scored: list[int] = []
        self.moved = True

    def generate(
        self, prompts: CompletionBatch, completions: int, sampling: Sampling, *, reference: bool = False
    ) -> Rollout:
        torch.rand(3)  # a sampler moves the random state
        self.calls.append((reference, self.training, torch.is_grad_enabled()))
        length = completions + 1
        ids = prompts.prompt_ids[:, :1, None].expand(-1, completions, length).clone()
        kept = torch.arange(length) < torch.arange(1, completions + 1)[:, None] + (0 if reference else 1)
        if not reference:
            ids[:, torch.arange(completions), torch.arange(completions) + 1] = EOS
        mask = kept.expand_as(ids)
        return Rollout(prompts._replace(completion_ids=ids, completion_mask=mask, reward=None, present=mask.any(-1)))

    def ended(self, batch: CompletionBatch) -> torch.Tensor:
        return (batch.completion_mask & (batch.completion_ids == EOS)).any(-1)

    def score(self, batch: CompletionBatch, *, kl: bool = False) -> Scores:
        """A token KL of the first prompt token's number at each token; to where the reference has moved, none."""
        self.scored.append(len(batch.row))
        token_kl = batch.prompt_ids[:, :1, None] * batch.completion_mask * (not self.moved)
        return Scores(torch.zeros_like(token_kl), None, None, token_kl.double(), None, batch.lengths)

    @contextmanager
    def from_the_start(self) -> Iterator[None]:
        self.moved = False
        yield
        self.moved = True

    def save_adapter(self, directory: str | Path) -> None:
        Path(directory).mkdir(parents=True)
        (Path(directory) / "adapter_model.safetensors").touch()


class ToyModule(LightningModule):
    """Logs the number of the optimizer step as its loss, at the end of every logging interval, as AlignModule does."""

    generates: ClassVar[bool] = True
    loading: ClassVar[tuple[str, ...]] = ()

    def __init__(self, stop_at: int = 0) -> None:
        super().__init__()
        self.pair = ToyPair()
        self.tokenizer = ToyTokenizer()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.stop_at = stop_at
        self.draws: list[float] = []

    def save(self, directory: str | Path) -> None:
        self.pair.save_adapter(directory)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.stop_at and self.trainer.global_step >= self.stop_at:
            raise KeyboardInterrupt
        self.draws.append(float(torch.rand(())))
        return self.weight * batch.mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if step % self.trainer.log_every_n_steps == 0:
            self.log_dict({"train/loss": float(step), "train/rewards/accuracies": 0.25}, on_step=True, on_epoch=False)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", torch.tensor(0.5), on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class ToyData(LightningDataModule):
    """Twelve numbers to train on; prompts are single letters, a, b, c and so on."""

    oracle = None

    def __init__(self, batches: int = 12) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(torch.ones(self.batches, 1), batch_size=1, generator=generator)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(torch.ones(1, 1), batch_size=1, generator=generator)  # type: ignore[arg-type]

    def prompts(self, n: int) -> CompletionBatch:
        ids = torch.arange(1, n + 1)[:, None]
        empty = torch.zeros(n, 1, 1, dtype=torch.long)
        return CompletionBatch(
            prompt_ids=ids,
            prompt_mask=torch.ones_like(ids, dtype=torch.bool),
            completion_ids=empty,
            completion_mask=empty.bool(),
            reward=None,
            present=empty[..., 0].bool(),
            row=torch.arange(n),
        )


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    """A quiet trainer of one epoch on the CPU."""
    defaults: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 2, "logger": False, "accelerator": "cpu"}
    defaults |= {"enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    defaults |= {"enable_progress_bar": any(hasattr(c, "get_metrics") for c in callbacks)}
    return Trainer(callbacks=list(callbacks), **defaults | options)
