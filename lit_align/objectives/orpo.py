"""ORPO: supervised fine-tuning on the chosen completion with a penalty on the odds of the rejected one."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def log_odds(mean_logps: Tensor) -> Tensor:
    """log [p / (1 - p)] of p = exp(p̄), the geometric mean probability of a completion's tokens.

    Args:
        mean_logps: p̄ in nats a token, any shape, < 0; exactly 0 is read as the next smaller number.

    Returns:
        The log-odds, same shape.
    """
    below = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).tiny)
    # log(1 - e^x): expm1 near 0, log1p far from it; each branch is finite wherever it is taken or not.
    near = torch.log(-torch.expm1(below.clamp(min=-math.log(2))))
    far = torch.log1p(-torch.exp(below.clamp(max=-math.log(2))))
    return below - torch.where(below > -math.log(2), near, far)


def orpo_loss(mean_logps: Tensor, lambda_: float) -> Tensor:
    """Negative log-likelihood of the chosen completion and the odds ratio penalty.

        L = -p̄_w - λ log σ(log odds_w - log odds_l)        Eq. 6 and 7 of arXiv 2403.07691

    Args:
        mean_logps: p̄ = log π_θ(y|x) / |y| of the chosen and the rejected completion in nats a token, (B, 2), < 0.
        lambda_: Weight of the penalty λ, >= 0.

    Returns:
        The loss of each pair in nats, (B,), > 0.
    """
    odds = log_odds(mean_logps)
    return -mean_logps[:, 0] - lambda_ * F.logsigmoid(odds[:, 0] - odds[:, 1])


class ORPO(AlignModule):
    """Odds ratio preference optimization, arXiv 2403.07691; its implicit reward is λ p̄.

    Args:
        lambda_: Weight of the odds ratio penalty λ, >= 0.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    def __init__(
        self, lambda_: float = 0.1, pair: PairSettings = PairSettings(), optim: OptimSettings = OptimSettings()
    ) -> None:
        super().__init__(pair, optim)
        check("model.lambda_", lambda_, lambda_ >= 0, "0 or more", "0.1")
        self.lambda_ = lambda_

    def loss(self, batch: CompletionBatch) -> Loss:
        """ORPO's loss of each pair."""
        scores = self.score(batch, reference=False)
        value = orpo_loss(scores.mean_logps, self.lambda_)
        return Loss(value, torch.ones_like(value), self.lambda_ * scores.mean_logps.detach(), {})
