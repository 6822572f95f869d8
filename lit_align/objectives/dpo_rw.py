"""DPO-rw: DPO generalized to K scored completions, the forward KL that EXO is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.objectives.exo import group_logps, reward_target
from lit_align.settings import OptimSettings, PairSettings, check


def dpo_rw_loss(logratio: Tensor, target_logps: Tensor, beta: float, present: Tensor | None = None) -> Tensor:
    """Cross-entropy of the policy's distribution over the K completions under the target's.

        L = -sum_k q_k log p_k,   p = softmax_k(β_π M_k)        Eq. 17 of arXiv 2402.00856

    Args:
        logratio: M = log π_θ/π_ref of each completion in nats, (B, K).
        target_logps: log q, normalised over the present columns, (B, K); -inf where q is 0.
        beta: Inverse temperature β_π, > 0.
        present: Which columns count, bool (B, K); None counts all.

    Returns:
        The cross-entropy of each prompt in nats, (B,), >= 0.
    """
    log_p, absent = group_logps(logratio, beta, present)
    return -(target_logps.exp().masked_fill(absent, 0) * log_p).sum(-1)


class DPORw(AlignModule):
    """DPO on scored groups, Eq. 17 of arXiv 2402.00856.

    Args:
        beta: Inverse temperature of the policy β_π, > 0.
        reward_beta: Temperature of the target β_r, > 0.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("beta",)
    columns = (2, 2**31)
    needs_reward = True

    def __init__(
        self,
        beta: float = 0.5,
        reward_beta: float = 0.1,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "0.5")
        check("model.reward_beta", reward_beta, reward_beta > 0, "greater than 0", "0.1")
        self.beta = beta
        self.reward_beta = reward_beta

    def loss(self, batch: CompletionBatch) -> Loss:
        """DPO-rw's loss of each group."""
        assert batch.reward is not None
        logratio = self.score(batch).logratio
        target = reward_target(batch.reward, self.reward_beta, batch.present)
        value = dpo_rw_loss(logratio, target, self.beta, batch.present)
        stats = {"beta": torch.tensor(self.beta)}
        return Loss(value, torch.ones_like(value), self.beta * logratio.detach(), stats)
