"""SLiC-HF: a hinge on the log-likelihood margin, with the likelihood of the chosen completion kept up."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def slic_loss(logps: Tensor, delta: float, lambda_: float) -> Tensor:
    """Hinge loss on the margin and cross-entropy on the chosen completion.

        L = max(0, δ - s) - λ log π_θ(y_w|x),   s = log π_θ(y_w|x) - log π_θ(y_l|x)        arXiv 2305.10425

    Args:
        logps: log π_θ of the chosen and the rejected completion in nats, (B, 2).
        delta: Margin δ in nats, >= 0.
        lambda_: Weight of the cross-entropy λ, >= 0.

    Returns:
        The loss of each pair in nats, (B,), >= 0.
    """
    return (delta - (logps[:, 0] - logps[:, 1])).clamp(min=0) - lambda_ * logps[:, 0]


class SLiC(AlignModule):
    """Sequence likelihood calibration with human feedback, arXiv 2305.10425; the target is the chosen completion.

    Args:
        delta: Margin δ in nats, >= 0.
        lambda_: Weight of the likelihood of the chosen completion λ, >= 0.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    def __init__(
        self,
        delta: float = 1.0,
        lambda_: float = 0.1,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.delta", delta, delta >= 0, "0 or more", "1")
        check("model.lambda_", lambda_, lambda_ >= 0, "0 or more", "0.1")
        self.delta = delta
        self.lambda_ = lambda_

    def loss(self, batch: CompletionBatch) -> Loss:
        """SLiC's loss of each pair."""
        logps = self.score(batch, reference=False).logps
        value = slic_loss(logps, self.delta, self.lambda_)
        return Loss(value, torch.ones_like(value), logps.detach(), {})
