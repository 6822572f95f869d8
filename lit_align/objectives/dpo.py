"""DPO: maximum likelihood of the preferences under the policy's implicit reward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def dpo_loss(logratio: Tensor, beta: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of preferring column 0 to column 1.

        L = -(1 - e) log σ(β m) - e log σ(-β m),   m = M_w - M_l        Eq. 7 of arXiv 2305.18290; e > 0 is cDPO

    Args:
        logratio: M = log π_θ/π_ref of the chosen and the rejected completion in nats, (B, 2).
        beta: Inverse temperature β, > 0; a number, or one for each pair, (B,).
        label_smoothing: Probability e that a label is flipped, in [0, 0.5).

    Returns:
        The loss of each pair in nats, (B,), > 0.
    """
    logit = beta * (logratio[:, 0] - logratio[:, 1])
    return -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


class DPO(AlignModule):
    """Direct preference optimization, arXiv 2305.18290.

    Args:
        beta: Inverse temperature β, > 0; larger keeps closer to the reference. The papers try 0.01 to 0.5.
        label_smoothing: Probability that a label is flipped (cDPO), in [0, 0.5); 0 is DPO.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("beta",)

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "0.1")
        check("model.label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "in [0, 0.5)", "0")
        self.beta = beta
        self.label_smoothing = label_smoothing

    def loss(self, batch: CompletionBatch) -> Loss:
        """DPO's loss of each pair."""
        logratio = self.score(batch).logratio
        value = dpo_loss(logratio, self.beta, self.label_smoothing)
        stats = {"beta": torch.tensor(self.beta)}
        return Loss(value, torch.ones_like(value), self.beta * logratio.detach(), stats)
