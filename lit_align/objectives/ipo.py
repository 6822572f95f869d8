"""IPO: regress the log-ratio margin onto a fixed target instead of pushing it without bound."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def ipo_loss(logratio: Tensor, tau: float) -> Tensor:
    """Squared distance of the log-ratio margin from its target.

        L = (m - 1 / (2 τ))²,   m = M_w - M_l        Eq. 17 of arXiv 2310.12036

    Args:
        logratio: M = log π_θ/π_ref of the chosen and the rejected completion in nats, (B, 2).
        tau: Strength of the regularization τ, > 0.

    Returns:
        The loss of each pair in nats², (B,), >= 0.
    """
    return (logratio[:, 0] - logratio[:, 1] - 1 / (2 * tau)) ** 2


class IPO(AlignModule):
    """Identity preference optimization, arXiv 2310.12036.

    Args:
        tau: Strength of the regularization τ, > 0: the margin aimed at is 1/(2τ) nats.
        length_average: Divide each log-ratio by its completion's tokens first, so that the target is nats a token;
            the paper, and the default, sum.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    def __init__(
        self,
        tau: float = 0.1,
        length_average: bool = False,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.tau", tau, tau > 0, "greater than 0", "0.1")
        self.tau = tau
        self.length_average = length_average

    def loss(self, batch: CompletionBatch) -> Loss:
        """IPO's loss of each pair."""
        scores = self.score(batch)
        logratio = scores.logratio / scores.lengths.clamp(min=1) if self.length_average else scores.logratio
        value = ipo_loss(logratio, self.tau)
        return Loss(value, torch.ones_like(value), self.tau * logratio.detach(), {})
