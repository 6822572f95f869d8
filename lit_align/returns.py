"""Rewards of completions and of tokens, turned into what a policy gradient is weighted by. Pure functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST_SPREAD = 1e-8
"""Added to the standard deviation that advantages are divided by, so that equal ones become 0."""


def token_rewards(reward: Tensor, logratio: Tensor, mask: Tensor, kl_coef: Tensor | float) -> Tensor:
    """The reward of each token: a penalty for leaving the reference, and at the last token the completion's reward.

        r_t = -β (log π_old(y_t) - log π_ref(y_t)) + [t is the last token] r(x, y)        Eq. 2 of arXiv 1909.08593

    Args:
        reward: External reward r(x, y), (B, K).
        logratio: log π_old - log π_ref of each token, nats (B, K, L).
        mask: Which tokens there are, bool (B, K, L).
        kl_coef: β, >= 0.

    Returns:
        The rewards, (B, K, L); 0 where there is no token.
    """
    follows = mask.flip(-1).cumsum(-1).flip(-1)  # tokens from here on
    penalty = torch.where(mask, -kl_coef * logratio, 0)
    return penalty + torch.where(mask & (follows == 1), reward[..., None], 0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates of the tokens of completions, and the returns they stand for.

        δ_t = r_t + γ V_{t+1} - V_t,   A_t = Σ_l (γ λ)^l δ_{t+l},   R_t = A_t + V_t        Eq. 16 of arXiv 1506.02438

    A completion ends with its last token, whether that is the end of sequence or the token budget is spent: V is 0
    behind it.

    Args:
        rewards: r_t, (B, K, L).
        values: V_t, the value of prompt and completion before token t, (B, K, L).
        mask: Which tokens there are, bool (B, K, L); others are passed over.
        gamma: Discount γ, in [0, 1].
        lam: λ, in [0, 1]; 1 is the Monte Carlo return less the value, 0 the one-step error δ.

    Returns:
        Advantages and returns, (B, K, L) each; 0 where there is no token.
    """
    advantages = torch.zeros_like(values)
    advantage = value = torch.zeros_like(values[..., 0])
    for t in reversed(range(values.shape[-1])):
        there = mask[..., t]
        error = rewards[..., t] + gamma * value - values[..., t]
        advantage = torch.where(there, error + gamma * lam * advantage, advantage)
        value = torch.where(there, values[..., t], value)
        advantages[..., t] = torch.where(there, advantage, 0)
    return advantages, torch.where(mask, advantages + values, 0)


def whitened(advantage: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Advantages less their mean, over their standard deviation, all tokens counting the same.

    Args:
        advantage: (B, K, L).
        mask: Which tokens there are, bool (B, K, L).
        total: From a tensor to its sum over all ranks, which then share one mean and one deviation.

    Returns:
        (B, K, L); 0 where there is no token, or all advantages are equal.
    """
    exact = advantage.double()
    count, added = total(torch.stack([mask.sum(), torch.where(mask, exact, 0).sum()]))
    centred = torch.where(mask, exact - added / count.clamp(min=1), 0)
    spread = (total(centred.square().sum()) / (count - 1).clamp(min=1)).sqrt()
    return (centred / (spread + SMALLEST_SPREAD)).to(advantage.dtype)
