"""REINFORCE: the policy gradient of the reward less a baseline, on completions drawn by the policy."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lit_align.baselines import leave_one_out, per_prompt, standardized
from lit_align.batch import CompletionBatch, Loss, Rollout
from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check
from lit_align.snapshot import snapshot


def reinforce_loss(logps: Tensor, advantage: Tensor) -> Tensor:
    """Log-likelihood weighted by what the completion is worth.

        L = -A log π_θ(y|x)        Eq. 19 of arXiv 2404.14367 with A = r̄

    Its gradient at the policy that drew y is on average that of -E[r], up to the scale of A.

    Args:
        logps: log π_θ of each completion in nats, (B, K).
        advantage: A, fixed before, (B, K).

    Returns:
        The loss of each completion, (B, K); it says nothing of progress by itself, only its gradient does.
    """
    return -advantage * logps


class REINFORCE(AlignModule):
    """REINFORCE as in arXiv 2404.14367; with ``baseline="leave_one_out"`` RLOO (arXiv 2402.14740).

    The advantage is fixed once for a fresh buffer. Completions of a dataset are compared with the rewards of the whole
    dataset; the gradient is then not that of the policy's expected reward.

    Args:
        baseline: What a reward is compared with: "batch" the whole buffer, in its standard deviations; "per_prompt" the
            mean of the prompt's completions; "leave_one_out" the mean of the prompt's other completions.
        kl_coef: Charge to the reward for each nat of log π_θ - log π_ref of the completion, >= 0.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    columns = (1, 2**31)
    needs_reward = True
    rollouts = True

    def __init__(
        self,
        baseline: Literal["batch", "per_prompt", "leave_one_out"] = "batch",
        kl_coef: float = 0.0,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.kl_coef", kl_coef, kl_coef >= 0, "0 or more", "0.05")
        self.baseline = baseline
        self.kl_coef = kl_coef

    def check_data(self, batch: CompletionBatch) -> None:
        """A baseline of the prompt's own completions needs two of them, and one of the dataset's rewards no charge."""
        held = self.source is not None and not getattr(self.source, "fresh", False)
        if self.kl_coef > 0 and self.baseline == "batch" and held:
            raise UserError(
                f"model.kl_coef is {self.kl_coef}, and {type(self.source).__name__} gives completions of a dataset, "
                "whose rewards as a whole are not charged, so they cannot be compared: set model.baseline to "
                "leave_one_out, model.kl_coef to 0, or take --data OnPolicyData"
            )
        if self.baseline != "batch" and batch.present.sum(-1).min() < 2:
            raise UserError(
                f"model.baseline is {self.baseline}, and some prompts have one completion, with nothing to compare it: "
                "set data.completions to 2 or more and data.select to ranked, or model.baseline to batch"
            )

    def annotate(self, rollout: Rollout) -> Rollout:
        """Fix the advantages, (B, K, 1)."""
        batch, reward = rollout.completions, rollout.completions.reward
        assert reward is not None
        if self.kl_coef > 0:
            # On the policy's own completions the mean log-ratio is KL(π_θ ‖ π_ref).
            reward = reward - self.kl_coef * snapshot(self.score, batch.to(self.device)).logratio.to(reward.device)
        if self.baseline == "batch":
            advantage = standardized(reward, batch.present, self.reward_pool(batch._replace(reward=reward)))
        else:
            baseline = per_prompt if self.baseline == "per_prompt" else leave_one_out
            advantage = baseline(reward, batch.present)
        return rollout._replace(advantage=advantage[..., None])

    def loss(self, batch: Rollout) -> Loss:
        """REINFORCE's loss of each completion."""
        assert batch.advantage is not None
        logps = self.score(batch.completions, reference=False).logps
        value = reinforce_loss(logps, batch.advantage[..., 0])
        return Loss(value, batch.completions.present.to(value.dtype), None, {})
