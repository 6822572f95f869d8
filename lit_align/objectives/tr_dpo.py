"""TR-DPO: DPO whose reference follows the policy."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.objectives.dpo import dpo_loss
from lit_align.settings import OptimSettings, PairSettings, check


class TRDPO(AlignModule):
    """Trust-region DPO, arXiv 2404.09656: every τ optimizer steps θ_ref ← α θ + (1 - α) θ_ref.

    The hard update is α = 1 with τ in the hundreds, the soft one α < 1 with τ = 1. The update is exact in the space of
    weights: with α < 1 the adapter's first factor is frozen and shared, and only the second is trained and averaged
    (averaging both factors would not average the weights they stand for). The reference is in the checkpoint.

    What is logged of the loss and its log-ratios is against the reference as it is; samples and ``evaluate`` say how
    far the policy is from where training began.

    Args:
        beta: Inverse temperature β, > 0.
        alpha: Share of the policy in the new reference α, in [0, 1]; 0 is DPO.
        tau: Optimizer steps between updates τ, >= 1.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("beta",)
    moves_reference = True
    waited: Tensor

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 0.6,
        tau: int = 1,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "0.1")
        check("model.alpha", alpha, 0 <= alpha <= 1, "in [0, 1]", "0.6")
        check("model.tau", tau, tau >= 1, "1 or more", "1 for soft updates and 128 for hard ones")
        self.beta = beta
        self.alpha = alpha
        self.tau = tau
        self.register_buffer("waited", torch.tensor(0))  # optimizer steps since the last update

    def configure_model(self) -> None:
        """Build the pair with a reference that can move."""
        if self.pair is None:
            super().configure_model()
            assert self.pair is not None
            self.pair.let_reference_move(averaged=0 < self.alpha < 1)

    def loss(self, batch: CompletionBatch) -> Loss:
        """DPO's loss of each pair against the present reference."""
        logratio = self.score(batch).logratio
        value = dpo_loss(logratio, self.beta)
        stats = {"beta": torch.tensor(self.beta)}
        return Loss(value, torch.ones_like(value), self.beta * logratio.detach(), stats)

    def adapt(self) -> None:
        """Move the reference at every τ-th optimizer step, those that were skipped left out."""
        assert self.pair is not None
        self.waited += 1
        if self.alpha > 0 and self.waited >= self.tau:
            self.pair.update_reference(self.alpha)
            self.waited.zero_()
