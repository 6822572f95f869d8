"""R-DPO: DPO whose reward charges for length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def r_dpo_loss(logratio: Tensor, lengths: Tensor, beta: float, alpha: float) -> Tensor:
    """DPO of the reward r(x, y) - α |y|.

        L = -log σ(β m + α (|y_w| - |y_l|)),   m = M_w - M_l        arXiv 2403.19159

    The sign of the length term follows from the regularized reward: where the chosen completion is longer, less margin
    is asked of the policy.

    Args:
        logratio: M = log π_θ/π_ref of the chosen and the rejected completion in nats, (B, 2).
        lengths: |y|, tokens of each completion, (B, 2).
        beta: Inverse temperature β, > 0.
        alpha: Reward charged for a token α, >= 0; 0 is DPO.

    Returns:
        The loss of each pair in nats, (B,), > 0.
    """
    longer = (lengths[:, 0] - lengths[:, 1]).to(logratio.dtype)
    return -F.logsigmoid(beta * (logratio[:, 0] - logratio[:, 1]) + alpha * longer)


class RDPO(AlignModule):
    """Length-regularized DPO, arXiv 2403.19159.

    Args:
        beta: Inverse temperature β, > 0.
        alpha: Reward charged for a token α, >= 0; 0 is DPO.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("beta",)

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 0.05,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "0.1")
        check("model.alpha", alpha, alpha >= 0, "0 or more", "0.05")
        self.beta = beta
        self.alpha = alpha

    def loss(self, batch: CompletionBatch) -> Loss:
        """R-DPO's loss of each pair."""
        scores = self.score(batch)
        value = r_dpo_loss(scores.logratio, scores.lengths, self.beta, self.alpha)
        stats = {"beta": torch.tensor(self.beta)}
        return Loss(value, torch.ones_like(value), self.beta * scores.logratio.detach(), stats)
