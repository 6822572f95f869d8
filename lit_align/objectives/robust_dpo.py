"""Robust DPO: an unbiased estimate of DPO's loss under labels that are flipped at a known rate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def robust_dpo_loss(logratio: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO's loss corrected for flipped labels: its mean over the flips is DPO's loss on the true labels.

        L = [-(1 - e) log σ(β m) + e log σ(-β m)] / (1 - 2e),   m = M_w - M_l        arXiv 2403.00409

    Args:
        logratio: M = log π_θ/π_ref of the chosen and the rejected completion in nats, (B, 2).
        beta: Inverse temperature β, > 0.
        label_smoothing: Probability e that a label is flipped, in [0, 0.5); 0 is DPO.

    Returns:
        The loss of each pair in nats, (B,); it may be negative.
    """
    logit = beta * (logratio[:, 0] - logratio[:, 1])
    kept, flipped = -F.logsigmoid(logit), -F.logsigmoid(-logit)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


class RobustDPO(AlignModule):
    """Provably robust DPO, arXiv 2403.00409.

    Args:
        beta: Inverse temperature β, > 0.
        label_smoothing: Probability that a label is flipped, in [0, 0.5); 0 is DPO.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("beta",)

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.1,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "0.1")
        check("model.label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "in [0, 0.5)", "0.1")
        self.beta = beta
        self.label_smoothing = label_smoothing

    def loss(self, batch: CompletionBatch) -> Loss:
        """Robust DPO's loss of each pair."""
        logratio = self.score(batch).logratio
        value = robust_dpo_loss(logratio, self.beta, self.label_smoothing)
        stats = {"beta": torch.tensor(self.beta)}
        return Loss(value, torch.ones_like(value), self.beta * logratio.detach(), stats)
