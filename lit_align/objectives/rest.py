"""ReST, also known as RAFT: likelihood of the completions whose reward is among the best."""

from __future__ import annotations

import math

from torch import Tensor

from lit_align.batch import Loss, Rollout
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def rest_loss(logps: Tensor) -> Tensor:
    """Negative log-likelihood of each completion.

        L = -log π_θ(y|x) where r(x, y) reaches the threshold        arXiv 2308.08998

    Args:
        logps: log π_θ of each completion in nats, (B, K).

    Returns:
        The loss of each completion in nats, (B, K), >= 0.
    """
    return -logps


def reward_threshold(pool: Tensor, quantile: float) -> Tensor:
    """The reward below which a share of the pool stays: of N rewards in order, that at ⌊quantile · N⌋ from 0.

    It is itself a reward of the pool, so N - ⌊quantile · N⌋ of them reach it, and more only where there are ties. Where
    that leaves any out, it leaves out those of the smallest reward: of 0 and 1, mostly 0, only those of 1 reach it.

    Args:
        pool: Rewards, (N,).
        quantile: In [0, 1).

    Returns:
        The smallest reward to learn from, (); infinite if there are none.
    """
    if len(pool) == 0:
        return pool.new_tensor(math.inf)
    # What 0.29 · 100 is short of 29 in floating point is no reason to keep one more.
    below = int(quantile * len(pool) + 1e-9)
    found = pool.kthvalue(1 + below).values
    return pool[pool > found].min() if below and pool.min() == found < pool.max() else found


class ReST(AlignModule):
    """Reinforced self-training (arXiv 2308.08998), or reward-ranked fine-tuning (arXiv 2304.06767).

    Learns from completions whose reward is at least a quantile of all rewards, those of the whole fresh buffer or of
    all training completions of a dataset; each counts the same, summed over its tokens. Completions with just the
    quantile's reward are among them, so ties with it stay together; but where any are left out and rewards differ,
    those of the smallest reward are. A minibatch of which none reaches it has no gradient.

    Args:
        quantile: Share of completions to leave out, in [0, 1); 0 keeps all.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    columns = (1, 2**31)
    needs_reward = True
    rollouts = True

    def __init__(
        self, quantile: float = 0.75, pair: PairSettings = PairSettings(), optim: OptimSettings = OptimSettings()
    ) -> None:
        super().__init__(pair, optim)
        check("model.quantile", quantile, 0 <= quantile < 1, "in [0, 1), a share of completions", "0.75")
        self.quantile = quantile

    def annotate(self, rollout: Rollout) -> Rollout:
        """Fix which completions count, 1 or 0, (B, K, 1)."""
        batch = rollout.completions
        assert batch.reward is not None
        kept = (batch.reward >= reward_threshold(self.reward_pool(batch), self.quantile)) & batch.present
        return rollout._replace(advantage=kept[..., None].to(batch.reward.dtype))

    def loss(self, batch: Rollout) -> Loss:
        """ReST's loss of each completion."""
        assert batch.advantage is not None
        value = rest_loss(self.score(batch.completions, reference=False).logps)
        return Loss(value, batch.advantage[..., 0].to(value.dtype), None, {})
