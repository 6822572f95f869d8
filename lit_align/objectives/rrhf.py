"""RRHF: rank the length-averaged log-probs of K completions as their rewards rank them."""

from __future__ import annotations

from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.objectives.reward_model import better_pairs
from lit_align.settings import OptimSettings, PairSettings, check


def rrhf_loss(mean_logps: Tensor, logps: Tensor, reward: Tensor, present: Tensor, lambda_: float) -> Tensor:
    """Hinge on every pair in the wrong order, and the likelihood of the best completion.

        L = sum_{r_i < r_j} max(0, p̄_i - p̄_j) - λ log π_θ(y_best|x)        Eq. 2 to 4 of arXiv 2304.05302

    Args:
        mean_logps: p̄ = log π_θ(y|x) / |y| in nats a token, (B, K).
        logps: log π_θ(y|x) in nats, (B, K).
        reward: External reward, larger is better, best first, (B, K).
        present: Which columns count, bool (B, K).
        lambda_: Weight of the likelihood of the best completion λ, >= 0.

    Returns:
        The loss of each group in nats, (B,), >= 0.
    """
    hinge = (mean_logps[:, None, :] - mean_logps[:, :, None]).clamp(min=0)
    return (hinge * better_pairs(reward, present)).sum((1, 2)) - lambda_ * logps[:, 0]


class RRHF(AlignModule):
    """Rank responses to align with human feedback, arXiv 2304.05302; its implicit reward is p̄.

    A group whose completions are all equally good has neither an order nor a best one, and is left out.

    Args:
        lambda_: Weight of the likelihood of the best completion λ, >= 0.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    columns = (2, 2**31)
    needs_reward = True

    def __init__(
        self, lambda_: float = 1.0, pair: PairSettings = PairSettings(), optim: OptimSettings = OptimSettings()
    ) -> None:
        super().__init__(pair, optim)
        check("model.lambda_", lambda_, lambda_ >= 0, "0 or more", "1")
        self.lambda_ = lambda_

    def loss(self, batch: CompletionBatch) -> Loss:
        """RRHF's loss of each group."""
        assert batch.reward is not None
        scores = self.score(batch, reference=False)
        value = rrhf_loss(scores.mean_logps, scores.logps, batch.reward, batch.present, self.lambda_)
        ranked = better_pairs(batch.reward, batch.present).any((1, 2))
        return Loss(value, ranked.to(value.dtype), scores.mean_logps.detach(), {})
