"""CPO: DPO under a uniform reference, with the likelihood of the chosen completion kept up."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def cpo_loss(logps: Tensor, beta: float, lambda_: float) -> Tensor:
    """Preference loss without a reference, and the negative log-likelihood of the chosen completion.

        L = -log σ(β s) - λ log π_θ(y_w|x),   s = log π_θ(y_w|x) - log π_θ(y_l|x)        arXiv 2401.08417

    Args:
        logps: log π_θ of the chosen and the rejected completion in nats, (B, 2).
        beta: Inverse temperature β, > 0.
        lambda_: Weight of the likelihood term λ, >= 0.

    Returns:
        The loss of each pair in nats, (B,), > 0.
    """
    return -F.logsigmoid(beta * (logps[:, 0] - logps[:, 1])) - lambda_ * logps[:, 0]


class CPO(AlignModule):
    """Contrastive preference optimization, arXiv 2401.08417.

    Args:
        beta: Inverse temperature β, > 0.
        lambda_: Weight of the likelihood of the chosen completion λ, >= 0.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("beta",)

    def __init__(
        self,
        beta: float = 0.1,
        lambda_: float = 1.0,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "0.1")
        check("model.lambda_", lambda_, lambda_ >= 0, "0 or more", "1")
        self.beta = beta
        self.lambda_ = lambda_

    def loss(self, batch: CompletionBatch) -> Loss:
        """CPO's loss of each pair."""
        logps = self.score(batch, reference=False).logps
        value = cpo_loss(logps, self.beta, self.lambda_)
        return Loss(value, torch.ones_like(value), self.beta * logps.detach(), {"beta": torch.tensor(self.beta)})
