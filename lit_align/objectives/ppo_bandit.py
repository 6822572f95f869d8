"""PPO without a critic: a completion is one action, with one probability ratio and one advantage."""

from __future__ import annotations

import torch

from lit_align.baselines import standardized
from lit_align.batch import Loss, Rollout
from lit_align.module import AlignModule
from lit_align.objectives.ppo import clipped_policy_loss, learned
from lit_align.settings import OptimSettings, PairSettings, check
from lit_align.snapshot import snapshot

LARGEST_LOGRATIO = 20.0
"""Where log π_θ / π_old of a completion is cut, far outside any clip, so that its exponential stays finite."""


class BanditPPO(AlignModule):
    """PPO whose action is the whole completion, Appendix I.2.4 of arXiv 2404.14367.

        L = -min(ρ r̄, clip(ρ, 1 - c, 1 + c) r̄),   ρ = π_θ(y|x) / π_old(y|x)

    r̄ are the rewards standardized over the buffers of all ranks. There is no penalty for leaving the reference.

    Args:
        clip: How far the ratio is rewarded for leaving 1, c > 0.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("ratio", "clip_share")
    columns = (1, 2**31)
    needs_reward = True
    needs_fresh = True
    rollouts = True

    def __init__(
        self, clip: float = 0.2, pair: PairSettings = PairSettings(), optim: OptimSettings = OptimSettings()
    ) -> None:
        super().__init__(pair, optim)
        check("model.clip", clip, clip > 0, "greater than 0", "0.2")
        self.clip = clip

    @torch.no_grad()
    def annotate(self, rollout: Rollout) -> Rollout:
        """Score the buffer, so that ratios begin at 1 as ``PPO`` has it, and standardize rewards."""
        home, rollout = rollout.completions.row.device, rollout.to(self.device)
        batch = rollout.completions
        assert batch.reward is not None
        scores = snapshot(lambda part: self.score(part, reference=False), batch)
        advantage = standardized(batch.reward, batch.present, self.reward_pool(batch))
        return rollout._replace(old_logps=scores.token_logps, advantage=advantage[..., None]).to(home)

    def loss(self, rollout: Rollout) -> Loss:
        """The clipped loss of each completion."""
        assert rollout.old_logps is not None
        assert rollout.advantage is not None
        scores = self.score(rollout.completions, reference=False)
        mask, present = learned(rollout.completions), rollout.completions.present
        moved = torch.where(mask, scores.token_logps - rollout.old_logps, 0).sum(-1)
        ratio = moved.clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO).exp()
        value = clipped_policy_loss(ratio, rollout.advantage[..., 0], self.clip)
        seen = {"ratio": ratio, "clip_share": (ratio - 1).abs() > self.clip}
        stats = {
            name: each[present].detach().double().sum() / present.sum().clamp(min=1) for name, each in seen.items()
        }
        return Loss(value, present.to(value.dtype), None, stats)
