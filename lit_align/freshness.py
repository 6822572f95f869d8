"""What fresh completions show when they are drawn, and how far the policy has moved on when they are learned from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_align.batch import Rollout, Scores
from lit_align.metrics import SumMetric


class FreshCompletions(SumMetric):
    """Completions as they were drawn and, where there is a reward, judged.

    Names: ``reward`` and ``reward_std`` over completions; ``reward_missing``, the share of groups whose reward failed;
    ``length`` in tokens; ``ended``, the share that ended before the budget or with it; ``kl``, KL(π_θ ‖ π_ref) in nats
    a completion; ``entropy`` of π_θ in nats a token.
    """

    def __init__(self, **kwargs: Any) -> None:
        names = ["reward", "squared_reward", "reward_missing", "length", "ended", "kl", "entropy"]
        super().__init__(names, **kwargs)

    def update(self, rollout: Rollout, scores: Scores, ended: Tensor) -> None:
        """Add a fresh buffer.

        Args:
            rollout: B groups of K completions; a group whose reward failed has no column present.
            scores: Of its first groups, with KL and entropy.
            ended: Whether a completion ended by itself, bool (B, K).
        """
        batch = rollout.completions
        there = batch.present
        if batch.reward is not None:
            self._add("reward", batch.reward[there])
            self._add("squared_reward", batch.reward[there].double().square())
            self._add("reward_missing", (~there.any(-1)).float())
        self._add("length", batch.lengths.float())
        self._add("ended", ended.float())
        if scores.token_kl is not None:
            self._add("kl", scores.token_kl.sum(-1))
        if scores.entropy is not None:
            self._add("entropy", scores.entropy.sum() / scores.lengths.sum(), scores.lengths.sum())

    def compute(self) -> dict[str, Tensor]:
        """The means; the spread of the reward in place of its mean square."""
        found = super().compute()
        if "squared_reward" in found:
            # From the sums in float64: the difference of two float32 means may be below 0.
            at, to = self.names.index("reward"), self.names.index("squared_reward")
            mean, square = self.total[at] / self.count[at], self.total[to] / self.count[to]
            del found["squared_reward"]
            found["reward_std"] = (square - mean**2).clamp(min=0).sqrt().float()
        return found


class Staleness(SumMetric):
    """How old the completions of a micro-batch are, and how far the policy has moved since it drew them.

    Names: ``age`` in optimizer steps; ``policy_shift``, an estimate of KL(π_old ‖ π_θ) in nats a completion: the sum
    over its tokens of exp(d) - 1 - d, d = log π_θ - log π_old, which is never below 0.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(["age", "policy_shift"], **kwargs)

    def update(self, rollout: Rollout, scores: Scores | None, step: int) -> None:
        """Add a micro-batch.

        Args:
            rollout: What is learned from.
            scores: Of its completions, or None.
            step: Optimizer steps taken before it.
        """
        if rollout.drawn_at is not None:
            self._add("age", (step - rollout.drawn_at).double())
        if rollout.old_logps is not None and scores is not None:
            moved = scores.token_logps.detach() - rollout.old_logps
            self._add("policy_shift", (moved.expm1() - moved).sum(-1), rollout.completions.present)
