"""RWR: reward-weighted regression, likelihood of all completions, each as much as the exponential of its reward."""

from __future__ import annotations

import math

from torch import Tensor

from lit_align.baselines import standardized
from lit_align.batch import Loss, Rollout
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def rwr_loss(logps: Tensor, weight: Tensor) -> Tensor:
    """Negative log-likelihood times a weight.

        L = -w log π_θ(y|x)        arXiv 2404.14367

    Args:
        logps: log π_θ of each completion in nats, (B, K).
        weight: w, fixed before, (B, K), >= 0.

    Returns:
        The loss of each completion in nats, (B, K), >= 0.
    """
    return -weight * logps


def rwr_weight(standardized_reward: Tensor, beta: float, max_weight: float) -> Tensor:
    """What a completion counts.

        w = min(exp(r̄ / β), w_max)        arXiv 2404.14367; the bound is a departure

    Args:
        standardized_reward: r̄, (B, K).
        beta: Temperature β, > 0.
        max_weight: w_max, > 0; infinite for no bound.

    Returns:
        w, (B, K), > 0 (0 where exp underflows).
    """
    # The bound comes first, so that the exponential does not overflow.
    return (standardized_reward / beta).clamp(max=math.log(max_weight)).exp()


class RWR(AlignModule):
    """Reward-weighted regression as in arXiv 2404.14367.

    r̄ is the reward standardized over the fresh buffer, or over all training completions of a dataset. On completions of
    one fixed distribution π the optimum is π(y|x) w(y), normalized for each prompt.

    Args:
        beta: Temperature β, > 0: large imitates all completions alike, small the best ones only.
        max_weight: Largest weight of a completion, > 0, ``.inf`` for no bound; where it is 1 or less, the completions
            that reach it, among them all of average reward and above, count alike.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("bounded",)
    columns = (1, 2**31)
    needs_reward = True
    rollouts = True

    def __init__(
        self,
        beta: float = 1.0,
        max_weight: float = 20.0,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "1")
        check("model.max_weight", max_weight, max_weight > 0, "greater than 0", "20")
        self.beta = beta
        self.max_weight = max_weight

    def annotate(self, rollout: Rollout) -> Rollout:
        """Fix the weights, (B, K, 1)."""
        batch = rollout.completions
        assert batch.reward is not None
        reward = standardized(batch.reward, batch.present, self.reward_pool(batch))
        return rollout._replace(advantage=rwr_weight(reward, self.beta, self.max_weight)[..., None])

    def loss(self, batch: Rollout) -> Loss:
        """RWR's loss of each completion."""
        assert batch.advantage is not None
        logps = self.score(batch.completions, reference=False).logps
        weight, present = batch.advantage[..., 0], batch.completions.present
        value = rwr_loss(logps, weight)
        bounded = ((weight >= self.max_weight * (1 - 1e-5)) & present).sum() / present.sum().clamp(min=1)
        return Loss(value, present.to(value.dtype), None, {"bounded": bounded})
