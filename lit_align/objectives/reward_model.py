"""A reward model: a scalar head on the policy's last hidden state, fitted to the order of completions."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def better_pairs(targets: Tensor, present: Tensor) -> Tensor:
    """Which completion i is better than which j, bool (B, K, K).

    Args:
        targets: What orders the completions of a group, larger is better, (B, K).
        present: Which columns count, bool (B, K).
    """
    return (targets[:, :, None] > targets[:, None, :]) & present[:, :, None] & present[:, None, :]


def reward_model_loss(rewards: Tensor, targets: Tensor, present: Tensor, center_coefficient: float = 0.0) -> Tensor:
    """Negative log-likelihood of the order of K completions under Bradley and Terry's model.

        L = mean over {i, j: t_i > t_j} of -log σ(r_i - r_j) + η (r_i + r_j)²        Eq. 1 of arXiv 2203.02155

    The second term holds rewards near 0, which the first leaves free up to a constant for each prompt (Eq. 2 of arXiv
    2312.09244); η > 0 is a departure from the former paper.

    Args:
        rewards: Predicted rewards r, (B, K).
        targets: What orders the completions t, larger is better, (B, K); completions of equal t are not compared.
        present: Which columns count, bool (B, K).
        center_coefficient: Weight of the second term η, >= 0.

    Returns:
        The loss of each group in nats, (B,), >= 0; 0 where no two completions differ in t.
    """
    better = better_pairs(targets, present)
    first, second = rewards[:, :, None], rewards[:, None, :]
    loss = -F.logsigmoid(first - second) + center_coefficient * (first + second) ** 2
    return torch.where(better, loss, 0).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)


class RewardModel(AlignModule):
    """A trained reward: Bradley and Terry's model of preferences, as in arXiv 2203.02155.

    The reward is linear in the policy's last hidden state at the last completion token. Groups are ordered by their
    rewards, or where there are none by their columns, best first; a group of equal rewards does not count.

    Args:
        center_coefficient: Weight of (r_i + r_j)², >= 0, which holds rewards near 0; 0 is the loss of the paper.
        pair: The model and its adapter; nothing is drawn from the reference.
        optim: The optimizer and its schedule.
    """

    columns = (2, 2**31)
    generates = False
    loading = ("from lit_align.rewards import TrainedReward", "reward = TrainedReward({folder!r})")

    def __init__(
        self,
        center_coefficient: float = 0.01,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.center_coefficient", center_coefficient, center_coefficient >= 0, "0 or more", "0.01")
        self.center_coefficient = center_coefficient
        self.head: nn.Linear | None = None

    def configure_model(self) -> None:
        """Build the pair, and a head with weights from N(0, 1/(H + 1)²), so that rewards begin near 0.

        The head has no bias: it would cancel in the loss.
        """
        if self.pair is None:
            super().configure_model()
            assert self.pair is not None
            weight = self.pair.base.get_output_embeddings().weight
            self.head = nn.Linear(weight.shape[1], 1, bias=False, device=weight.device, dtype=torch.float32)
            nn.init.normal_(self.head.weight, std=1 / (weight.shape[1] + 1))

    def rewards(self, batch: CompletionBatch) -> Tensor:
        """The reward of each completion, float32 (B, K); 0 for an absent one."""
        assert self.pair is not None
        assert self.head is not None
        hidden = self.pair.final_hidden(batch)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.head.weight.float()).squeeze(-1)

    def loss(self, batch: CompletionBatch) -> Loss:
        """The loss of each group."""
        rewards = self.rewards(batch)
        order = -torch.arange(rewards.shape[1], device=rewards.device).expand_as(rewards)
        targets = order if batch.reward is None else batch.reward
        value = reward_model_loss(rewards, targets, batch.present, self.center_coefficient)
        weight = better_pairs(targets, batch.present).any((1, 2)).to(value.dtype)
        return Loss(value, weight, rewards.detach(), {})

    def save(self, directory: str | Path) -> None:
        """Write the adapter, the head, and the scale of the validation rewards by the weights that are saved."""
        super().save(directory)
        assert self.head is not None
        write_head(Path(directory), self.head.weight, self.pair_settings, self._validation_rewards())

    @torch.no_grad()
    def _validation_rewards(self) -> Tensor:
        """Rewards of the validation completions this rank sees, (N,)."""
        trainer = self._trainer
        loader = None if trainer is None else trainer.val_dataloaders
        batches = islice(loader, int(sum(trainer.num_val_batches))) if trainer and loader else ()
        found = [self.rewards(batch.to(self.device))[batch.present.to(self.device)].cpu() for batch in batches]
        return torch.cat(found) if found else torch.empty(0)


def write_head(directory: Path, weight: Tensor, settings: PairSettings, validation: Tensor) -> None:
    """Write ``reward_head.safetensors`` and ``reward.json``, which ``lit_align.rewards.TrainedReward`` reads.

    Args:
        directory: Holds the adapter.
        weight: Of the head, (1, H).
        settings: The base under the adapter.
        validation: Rewards whose mean and standard deviation standardize others, (N,); with N < 2 there is none.
    """
    from safetensors.torch import save_file

    save_file({"weight": weight.detach().float().cpu().contiguous()}, directory / "reward_head.safetensors")
    about: dict[str, Any] = {name: getattr(settings, name) for name in ("model", "revision", "dtype", "quantization")}
    if len(validation) > 1:
        about |= {"mean": validation.double().mean().item(), "std": validation.double().std().item()}
    about["validation_completions"] = len(validation)
    (directory / "reward.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
