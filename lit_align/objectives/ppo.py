"""PPO: a clipped policy gradient on fresh completions, with a critic and a penalty for leaving the reference."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_align.baselines import standardized
from lit_align.batch import CompletionBatch, Loss, Rollout
from lit_align.metrics import Total
from lit_align.module import AlignModule
from lit_align.returns import gae, token_rewards, whitened
from lit_align.settings import OptimSettings, PairSettings, check
from lit_align.snapshot import snapshot


def clipped_policy_loss(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The surrogate objective of PPO, negated.

        L = -min(ρ A, clip(ρ, 1 - c, 1 + c) A)        Eq. 7 of arXiv 1707.06347

    arXiv 2404.14367 prints max in place of min, which would not bound the gain from moving away.

    Args:
        ratio: ρ = π_θ / π_old of a token or a completion, any shape.
        advantage: A, of a shape that broadcasts with it.
        clip: c, > 0.

    Returns:
        The loss, the same shape. Without gradient where A > 0 and ρ > 1 + c, and where A < 0 and ρ < 1 - c.
    """
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Squared error of a critic that gains nothing by moving further than ``clip`` from where it was.

        L = ½ max((V - R)², (V_old + clip(V - V_old, -c, c) - R)²)        as in the code of arXiv 1909.08593

    Args:
        values: V, any shape.
        old_values: V_old, the same shape.
        returns: R, the same shape.
        clip: c, in units of the reward, > 0.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def adapted_kl_coef(kl_coef: Tensor, kl: Tensor, target: float, completions: Tensor, horizon: float) -> Tensor:
    """The coefficient of the KL penalty after a buffer.

        β ← β (1 + clip(KL / target - 1, -0.2, 0.2) min(n / horizon, 1))        Section 2.2 of arXiv 1909.08593

    The paper has a constant gain; n / horizon is that of its authors' code, in which β turns negative at 5 horizons.

    Args:
        kl_coef: β, (), >= 0.
        kl: Mean KL(π ‖ π_ref) of the buffer's completions, nats, ().
        target: Nats a completion, > 0.
        completions: How many there were n, ().
        horizon: Completions over which β may change by a fifth, > 0.
    """
    error = (kl / target - 1).clamp(-0.2, 0.2)
    return kl_coef * (1 + error * (completions / horizon).clamp(max=1))


class PPO(AlignModule):
    """Proximal policy optimization token by token, arXiv 1707.06347, with the KL penalty of arXiv 1909.08593.

    The critic is linear in the policy's last hidden state; its gradient goes to the adapter as well. Advantages are
    estimated once for each buffer (arXiv 1506.02438), from the reward at the last token and a penalty of the log-ratio
    to the reference at each. A step that is frozen or stopped leaves what it must not move without gradient, which
    AdamW passes over, momentum and weight decay included.

    Args:
        clip: How far a token's probability ratio is rewarded for leaving 1, > 0.
        value_clip: The same for the critic, in units of the (standardized) reward, > 0.
        value_coef: Weight of the critic's loss, >= 0.
        gamma: Discount γ of a token, in [0, 1].
        lam: λ of the advantages, in [0, 1].
        kl_coef: Coefficient β of the KL penalty at the start, >= 0; see ``kl_target``.
        kl_target: Nats a completion that β steers to, once for each buffer, > 0; None keeps β.
        kl_horizon: Completions over which β may change by a fifth, > 0.
        target_kl: Nats a token from the policy that drew the buffer, > 0: an optimizer step that finds it further
            away is not taken, nor are the steps after it on the same buffer. None takes all.
        critic_warmup_steps: Optimizer steps at the start in which the critic's head alone learns, >= 0.
        standardize: Whether rewards are standardized over the buffers of all ranks, as every method of arXiv 2404.14367
            has them: β, the critic's clip and its start at 0 are then in proportion, whatever the reward's scale. Raw
            rewards far from 0 outrun the clipped critic, and with λ < 1 late tokens are then charged most.
        whiten: Whether advantages are standardized over the tokens of all ranks' buffers, which no paper here does.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("ratio", "clip_share", "approx_kl", "value_loss", "explained_variance", "kl_coef", "stopped")
    columns = (1, 2**31)
    needs_reward = True
    needs_fresh = True
    rollouts = True
    kl_coef: Tensor
    stopped: Tensor

    def __init__(
        self,
        clip: float = 0.2,
        value_clip: float = 0.2,
        value_coef: float = 0.1,
        gamma: float = 1.0,
        lam: float = 0.95,
        kl_coef: float = 0.2,
        kl_target: float | None = 6.0,
        kl_horizon: float = 10000,
        target_kl: float | None = 0.1,
        critic_warmup_steps: int = 0,
        standardize: bool = True,
        whiten: bool = True,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        for name, value, usual in (
            ("clip", clip, "0.2"),
            ("value_clip", value_clip, "0.2"),
            ("kl_target", 6.0 if kl_target is None else kl_target, "6"),
            ("kl_horizon", kl_horizon, "10000"),
            ("target_kl", 0.1 if target_kl is None else target_kl, "0.1"),
        ):
            check(f"model.{name}", value, value > 0, "greater than 0", usual)
        for name, value, usual in (("value_coef", value_coef, "0.1"), ("kl_coef", kl_coef, "0.2")):
            check(f"model.{name}", value, value >= 0, "0 or more", usual)
        for name, value, usual in (("gamma", gamma, "1"), ("lam", lam, "0.95")):
            check(f"model.{name}", value, 0 <= value <= 1, "in [0, 1]", usual)
        check("model.critic_warmup_steps", critic_warmup_steps, critic_warmup_steps >= 0, "0 or more", "0")
        self.clip, self.value_clip, self.value_coef = clip, value_clip, value_coef
        self.gamma, self.lam, self.standardize, self.whiten = gamma, lam, standardize, whiten
        self.kl_target, self.kl_horizon = kl_target, kl_horizon
        self.target_kl, self.critic_warmup_steps = target_kl, critic_warmup_steps
        self.register_buffer("kl_coef", torch.tensor(kl_coef, dtype=torch.float64))
        self.register_buffer("stopped", torch.tensor(False))
        self.step_kl = Total()
        self.head: nn.Linear | None = None

    def configure_model(self) -> None:
        """Build the pair, and a critic that begins at 0."""
        if self.pair is None:
            super().configure_model()
            assert self.pair is not None
            weight = self.pair.base.get_output_embeddings().weight
            self.head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=torch.float32)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def values(self, hidden: Tensor) -> Tensor:
        """The critic: from last hidden states (T, H) to values, float32 (T,)."""
        assert self.head is not None
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.head.weight, self.head.bias).squeeze(-1)

    @torch.no_grad()
    def annotate(self, rollout: Rollout) -> Rollout:
        """Score the buffer by policy, reference and critic, and estimate advantages; then adapt β for the next one.

        ``old_logps`` are the scorer's, so that truncated draws have them and ratios begin at 1, but for what a batch of
        another size rounds otherwise: 1e-5 nats a token in float32, and up to 0.2 on a base in bfloat16.
        """
        home, rollout = rollout.completions.row.device, rollout.to(self.device)
        batch = rollout.completions
        assert batch.reward is not None
        scores = snapshot(lambda part: self.score(part, value_head=self.values), batch)
        assert scores.values is not None
        assert scores.reference_token_logps is not None
        mask = learned(batch)
        logratio = torch.where(mask, scores.token_logps - scores.reference_token_logps, 0)
        reward = batch.reward
        if self.standardize:
            reward = standardized(reward, batch.present, self.reward_pool(batch))
        rewards = token_rewards(reward, logratio, mask, self.kl_coef)
        advantage, returns = gae(rewards, scores.values, mask, self.gamma, self.lam)
        self._adapt_kl_coef(logratio.sum(-1)[batch.present])
        self.stopped = torch.zeros_like(self.stopped)
        return rollout._replace(
            old_logps=scores.token_logps,
            reference_logps=scores.reference_token_logps,
            advantage=whitened(advantage, mask, self.over_ranks) if self.whiten else advantage,
            old_values=scores.values,
            returns=returns,
        ).to(home)

    def loss(self, rollout: Rollout) -> Loss:
        """The clipped losses of policy and critic at each token."""
        assert rollout.old_logps is not None
        assert rollout.advantage is not None
        assert rollout.old_values is not None
        assert rollout.returns is not None
        scores = self.score(rollout.completions, reference=False, value_head=self.values)
        assert scores.values is not None
        mask = learned(rollout.completions)
        moved = torch.where(mask, scores.token_logps - rollout.old_logps, 0)
        ratio = moved.exp()
        critic = clipped_value_loss(scores.values, rollout.old_values, rollout.returns, self.value_clip)
        value = clipped_policy_loss(ratio, rollout.advantage, self.clip) + self.value_coef * critic
        shift = moved.expm1() - moved  # never below 0, and its mean over draws is KL(π_old ‖ π_θ)
        if self.training:
            self.step_kl.update(shift[mask])
        clipped = (ratio - 1).abs() > self.clip
        seen = {"ratio": ratio, "clip_share": clipped, "approx_kl": shift, "value_loss": critic}
        stats = {name: each[mask].detach().double().sum() / mask.sum().clamp(min=1) for name, each in seen.items()}
        stats["explained_variance"] = explained_variance(scores.values.detach()[mask], rollout.returns[mask])
        stats |= {"kl_coef": self.kl_coef, "stopped": self.stopped.double()}
        return Loss(torch.where(mask, value, 0), mask.to(value.dtype), None, stats)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Reduce the gradient; keep none of the policy while the critic warms up, none at all once stopped."""
        super().on_before_optimizer_step(optimizer)
        shift, tokens = self.step_kl.compute()
        self.step_kl.reset()
        if self.target_kl is not None:
            self.stopped = self.stopped | (shift > self.target_kl * tokens)
        assert self.pair is not None
        warming = self.trainer.global_step < self.critic_warmup_steps
        for parameter in self.parameters() if self.stopped else self.pair.parameters() if warming else ():
            parameter.grad = None

    def _adapt_kl_coef(self, kl: Tensor) -> None:
        """One step of the controller, from the log-ratio of each completion of this rank's buffer, nats (N,)."""
        if self.kl_target is None:
            return
        total, count = self.over_ranks(torch.stack([kl.double().sum(), kl.new_tensor(kl.numel()).double()]))
        # A new tensor, never in place: processes started with a copy of the module may share this one's memory.
        self.kl_coef = adapted_kl_coef(self.kl_coef, total / count.clamp(min=1), self.kl_target, count, self.kl_horizon)


def learned(batch: CompletionBatch) -> Tensor:
    """Which tokens are learned from, bool (B, K, L): a column whose reward failed is drawn, but not present."""
    return batch.completion_mask & batch.present[..., None]


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over tokens, (), at most 1; 0 where the returns are all equal.

    Args:
        values: V, (T,).
        returns: R, (T,).
    """
    spread = returns.var(correction=0)
    left = (returns - values).var(correction=0)
    return torch.where(spread > 0, 1 - left / spread, 0) if len(returns) else spread.new_zeros(())
