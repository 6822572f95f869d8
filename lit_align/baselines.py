"""What a reward is worth beside others: standardized over a pool, or less the rewards of the same prompt.

Sums are taken in float64, so that the order of completions and ranks does not show.
"""

from __future__ import annotations

from torch import Tensor


def standardized(reward: Tensor, present: Tensor, pool: Tensor) -> Tensor:
    """Rewards in standard deviations from the mean of a pool.

        r̄ = (r - mean) / σ̂,   σ̂² = Σ (r_i - mean)² / (N - 1)        Eq. 19 of arXiv 2404.14367

    Args:
        reward: External reward of each completion, (B, K).
        present: Which columns count, bool (B, K).
        pool: All rewards it is compared with, (N,), such as those of a fresh buffer over all ranks.

    Returns:
        r̄, (B, K), without gradient; 0 in absent columns, and everywhere if N < 2 or all rewards of the pool are equal.
    """
    # Rounding may leave equal rewards a deviation above 0, so equality is asked for directly.
    if pool.numel() < 2 or pool.min() == pool.max():
        return reward.new_zeros(reward.shape)
    wide = pool.detach().double()
    found = (reward.detach().double() - wide.mean()) / wide.std(correction=1)
    return found.masked_fill(~present, 0).to(reward.dtype)


def per_prompt(reward: Tensor, present: Tensor) -> Tensor:
    """Rewards less the mean of their group.

        A_k = r_k - (1/C) Σ_j r_j,   which is (C - 1)/C times that of ``leave_one_out``

    Args:
        reward: External reward of each completion, (B, K).
        present: Which columns count, bool (B, K); C of a group are present.

    Returns:
        A, (B, K), without gradient; 0 in absent columns, and in a group of one.
    """
    there = reward.detach().double().masked_fill(~present, 0)
    mean = there.sum(-1, keepdim=True) / present.sum(-1, keepdim=True).clamp(min=1)
    return (there - mean).masked_fill(~present, 0).to(reward.dtype)


def leave_one_out(reward: Tensor, present: Tensor) -> Tensor:
    """Rewards less the mean of the others of their group, a baseline that does not depend on the completion itself.

        A_k = r_k - (1/(C - 1)) Σ_{j≠k} r_j        arXiv 2402.14740

    Args:
        reward: External reward of each completion, (B, K).
        present: Which columns count, bool (B, K); C of a group are present.

    Returns:
        A, (B, K), without gradient; 0 in absent columns, and in a group of one, which has no others.
    """
    there = reward.detach().double().masked_fill(~present, 0)
    others = present.sum(-1, keepdim=True) - 1
    mean = (there.sum(-1, keepdim=True) - there) / others.clamp(min=1)
    return (there - mean).masked_fill(~(present & (others > 0)), 0).to(reward.dtype)
