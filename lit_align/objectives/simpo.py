"""SimPO: length-averaged log-probs as the reward, with a target margin and no reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def simpo_loss(mean_logps: Tensor, beta: float, gamma: float) -> Tensor:
    """Negative log-likelihood of a reward margin beyond γ.

        L = -log σ(β (p̄_w - p̄_l) - γ),   p̄ = log π_θ(y|x) / |y|        Eq. 6 of arXiv 2405.14734

    Args:
        mean_logps: p̄ of the chosen and the rejected completion in nats a token, (B, 2).
        beta: Scale of the reward β, > 0.
        gamma: Target margin γ of the reward, >= 0.

    Returns:
        The loss of each pair in nats, (B,), > 0.
    """
    return -F.logsigmoid(beta * (mean_logps[:, 0] - mean_logps[:, 1]) - gamma)


class SimPO(AlignModule):
    """Simple preference optimization, arXiv 2405.14734.

    Args:
        beta: Scale of the reward β, > 0.
        gamma_beta_ratio: Target margin in units of β, γ/β, >= 0.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("beta",)

    def __init__(
        self,
        beta: float = 2.0,
        gamma_beta_ratio: float = 0.5,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "2")
        check("model.gamma_beta_ratio", gamma_beta_ratio, gamma_beta_ratio >= 0, "0 or more", "0.5")
        self.beta = beta
        self.gamma = gamma_beta_ratio * beta

    def loss(self, batch: CompletionBatch) -> Loss:
        """SimPO's loss of each pair."""
        scores = self.score(batch, reference=False)
        value = simpo_loss(scores.mean_logps, self.beta, self.gamma)
        implicit = self.beta * scores.mean_logps.detach()
        return Loss(value, torch.ones_like(value), implicit, {"beta": torch.tensor(self.beta)})
