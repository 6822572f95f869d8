"""EXO: the reverse KL from the policy's distribution over K completions to the target's, exactly optimized."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def exo_loss(logratio: Tensor, target_logps: Tensor, beta: float, present: Tensor | None = None) -> Tensor:
    """Reverse KL from the policy's distribution over the K completions to the target's.

        L = sum_k p_k (log p_k - log q_k),   p = softmax_k(β_π M_k)        Eq. 13 and 16 of arXiv 2402.00856

    Args:
        logratio: M = log π_θ/π_ref of each completion in nats, (B, K).
        target_logps: log q, normalised over the present columns, (B, K).
        beta: Inverse temperature β_π, > 0.
        present: Which columns count, bool (B, K); None counts all.

    Returns:
        The divergence of each prompt in nats, (B,), >= 0.
    """
    log_p, absent = group_logps(logratio, beta, present)
    gap = log_p - target_logps.masked_fill(absent, 0)
    return (log_p.exp().masked_fill(absent, 0) * gap).sum(-1)


def group_logps(logratio: Tensor, beta: float, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """log p of the policy's distribution over the K completions, p = softmax_k(β_π M_k).

    Args:
        logratio: M = log π_θ/π_ref of each completion in nats, (B, K).
        beta: Inverse temperature β_π, > 0.
        present: Which columns count, bool (B, K); None counts all.

    Returns:
        log p, (B, K), 0 in absent columns, and which columns are absent, bool (B, K).
    """
    absent = torch.zeros_like(logratio, dtype=torch.bool) if present is None else ~present
    return (beta * logratio).masked_fill(absent, -math.inf).log_softmax(-1).masked_fill(absent, 0), absent


def reward_target(reward: Tensor, beta: float, present: Tensor) -> Tensor:
    """log q of the optimal policy restricted to the K completions.

        q = softmax_k(r_k / β_r)        arXiv 2402.00856

    Args:
        reward: External reward of each completion, (B, K).
        beta: Temperature of the target β_r, > 0.
        present: Which columns count, bool (B, K).

    Returns:
        log q, (B, K); -inf in absent columns.
    """
    return (reward / beta).masked_fill(~present, -math.inf).log_softmax(-1)


def preference_target(pairs: int, epsilon: float, like: Tensor) -> Tensor:
    """log q = (log(1 - ε), log ε) of each pair.

    Args:
        pairs: B.
        epsilon: Probability the target leaves to the rejected completion ε, in (0, 0.5).
        like: A tensor whose dtype and device the result takes.

    Returns:
        log q, (B, 2).
    """
    return torch.tensor([math.log1p(-epsilon), math.log(epsilon)], dtype=like.dtype, device=like.device).expand(
        pairs, 2
    )


class EXORw(AlignModule):
    """EXO on scored groups, Eq. 13 of arXiv 2402.00856.

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
        """EXO's loss of each group."""
        assert batch.reward is not None
        logratio = self.score(batch).logratio
        target = reward_target(batch.reward, self.reward_beta, batch.present)
        value = exo_loss(logratio, target, self.beta, batch.present)
        stats = {"beta": torch.tensor(self.beta)}
        return Loss(value, torch.ones_like(value), self.beta * logratio.detach(), stats)


class EXOPref(AlignModule):
    """EXO on preference pairs, Eq. 16 of arXiv 2402.00856.

    Args:
        beta: Inverse temperature of the policy β_π, > 0.
        epsilon: Probability the target leaves to the rejected completion ε, in (0, 0.5).
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("beta",)

    def __init__(
        self,
        beta: float = 0.5,
        epsilon: float = 1e-3,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "0.5")
        check("model.epsilon", epsilon, 0 < epsilon < 0.5, "in (0, 0.5)", "0.001")
        self.beta = beta
        self.epsilon = epsilon

    def loss(self, batch: CompletionBatch) -> Loss:
        """EXO's loss of each pair."""
        logratio = self.score(batch).logratio
        value = exo_loss(logratio, preference_target(len(logratio), self.epsilon, logratio), self.beta)
        stats = {"beta": torch.tensor(self.beta)}
        return Loss(value, torch.ones_like(value), self.beta * logratio.detach(), stats)
