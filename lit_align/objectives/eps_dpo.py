"""ε-DPO: DPO whose β is adapted pair by pair, by whether a pair's log-ratio is monotone under perturbation."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss, Scores
from lit_align.metrics import Total
from lit_align.module import AlignModule
from lit_align.objectives.dpo import dpo_loss
from lit_align.settings import OptimSettings, PairSettings, check


def monotone_step(scores: Scores) -> Tensor:
    """Direction in which a pair asks β to move, from the likelihood ratio under two perturbed policies.

        z(λ) = log [π_λ(y_w) / π_λ(y_l)],   π_λ = softmax(λ f_θ + (1 - λ) f_ref) token by token
        +1 if z(1 + ε) > z(1) > z(1 - ε),   -1 if z(1 + ε) < z(1) < z(1 - ε),   0 otherwise

    arXiv 2502.13177. +1 asks for a smaller β.

    Args:
        scores: Scores of pairs, with the mixtures of some ε.

    Returns:
        +1, 0 or -1 for each pair, int64 (B,), without gradient.
    """
    assert scores.perturbed is not None
    tokens = [scores.perturbed.outward, scores.token_logps.detach(), scores.perturbed.inward]
    # Signs of sums of differences: they are exactly 0 where the policies agree, whatever the rounding of long sums.
    wide, narrow = (_pair_gap(tokens[0] - tokens[1]), _pair_gap(tokens[1] - tokens[2]))
    up = (wide > 0) & (narrow > 0)
    down = (wide < 0) & (narrow < 0)
    return up.long() - down.long()


def adapted_beta(step: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    """β of each pair.

        β̃ = β / (1 + ε) at step +1,   β / (1 - ε) at step -1,   β at step 0        arXiv 2502.13177

    Args:
        step: +1, 0 or -1 for each pair, (B,).
        beta: The current β, (), > 0.
        epsilon: Perturbation ε, in [0, 1).

    Returns:
        β̃, (B,), > 0.
    """
    return beta / (1 + epsilon * step.to(beta.dtype))


def _pair_gap(token_values: Tensor) -> Tensor:
    """Sum over the tokens of the chosen completion minus the same of the rejected, (B,)."""
    total = token_values.sum(-1)
    return total[:, 0] - total[:, 1]


class EpsilonDPO(AlignModule):
    """KL penalty control via perturbation, arXiv 2502.13177.

    After each optimizer step β becomes the mean of β̃ over all pairs of that step, on all ranks (Eq. 6). It does not
    move in validation, and it is part of the checkpoint.

    Args:
        beta: β at the start, > 0.
        epsilon: Perturbation ε, in [0, 1); 0 is DPO.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("beta", "steps_up", "steps_down")
    beta: Tensor

    def __init__(
        self,
        beta: float = 0.01,
        epsilon: float = 0.01,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "0.01")
        check("model.epsilon", epsilon, 0 <= epsilon < 1, "in [0, 1)", "0.01")
        self.epsilon = epsilon
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float64))
        self.step_beta = Total()

    def loss(self, batch: CompletionBatch) -> Loss:
        """DPO's loss of each pair at its own β̃."""
        scores = self.score(batch, epsilon=self.epsilon)
        step = monotone_step(scores)
        beta = adapted_beta(step, self.beta.clone(), self.epsilon)
        if self.training:
            self.step_beta.update(beta)
        logratio = scores.logratio
        value = dpo_loss(logratio, beta.to(logratio.dtype))
        stats = {"beta": beta.mean(), "steps_up": (step > 0).double().mean(), "steps_down": (step < 0).double().mean()}
        implicit = beta[:, None].to(logratio.dtype) * logratio.detach()
        return Loss(value, torch.ones_like(value), implicit, stats)

    def adapt(self) -> None:
        """β ← mean of β̃ over the optimizer step."""
        total, count = self.step_beta.compute()
        self.beta.copy_(total / count)
        self.step_beta.reset()
