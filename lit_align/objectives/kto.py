"""KTO: prospect theory on single completions labelled good or bad."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def kto_loss(
    logratio: Tensor, good: Tensor, z: Tensor, beta: float, good_weight: float = 1.0, bad_weight: float = 1.0
) -> Tensor:
    """The value lost against a reference point.

        L = λ_w (1 - σ(β (M - z))) for a good completion,   λ_l (1 - σ(β (z - M))) for a bad one
        arXiv 2402.01306

    Args:
        logratio: M = log π_θ/π_ref of each completion in nats, (B,).
        good: Whether the completion is labelled good, bool (B,).
        z: Reference point, an estimate of KL(π_θ ‖ π_ref) in nats, (), >= 0, without gradient.
        beta: Inverse temperature β, > 0.
        good_weight: Weight of good completions λ_w, > 0.
        bad_weight: Weight of bad completions λ_l, > 0.

    Returns:
        The loss of each completion, (B,), in (0, λ).
    """
    sign = torch.where(good, 1.0, -1.0).to(logratio.dtype)
    weight = torch.where(good, good_weight, bad_weight).to(logratio.dtype)
    return weight * torch.sigmoid(-sign * beta * (logratio - z))


def reference_point(mismatched: Tensor, present: Tensor) -> Tensor:
    """z of a micro-batch: the mean log-ratio of completions that belong to other prompts, at least 0.

        z = max(0, mean_i log π_θ/π_ref (y_{i+1} | x_i))        arXiv 2402.01306

    Args:
        mismatched: Log-ratio of the mismatched completions in nats, any shape, such as (B, 1) or (B, 0).
        present: Which are there, bool, the same shape.

    Returns:
        Sum and number of the log-ratios, (2,), so that ranks can be added up before dividing.
    """
    kept = mismatched.detach() * present
    return torch.stack([kept.sum(), present.sum().to(kept.dtype)])


class KTO(AlignModule):
    """Kahneman-Tversky optimization, arXiv 2402.01306, on unpaired completions.

    z is the mean over the micro-batches of all ranks at the same moment, so it depends on the micro-batch size; a
    micro-batch of one prompt has no mismatched completion and z = 0.

    Args:
        beta: Inverse temperature β, > 0.
        good_weight: Weight of good completions λ_w, > 0.
        bad_weight: Weight of bad completions λ_l, > 0.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("beta", "z")
    columns = (1, 1)
    needs_reward = True

    def __init__(
        self,
        beta: float = 0.1,
        good_weight: float = 1.0,
        bad_weight: float = 1.0,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "0.1")
        check("model.good_weight", good_weight, good_weight > 0, "greater than 0", "1")
        check("model.bad_weight", bad_weight, bad_weight > 0, "greater than 0", "1")
        self.beta = beta
        self.good_weight = good_weight
        self.bad_weight = bad_weight

    def check_data(self, batch: CompletionBatch) -> None:
        """Labels are +1 and -1."""
        if batch.reward is not None and not (batch.reward.abs() == 1).all():
            raise UserError(
                "KTO needs completions labelled good or bad, not scored: give the rows to --data UnpairedData"
            )

    def loss(self, batch: CompletionBatch) -> Loss:
        """KTO's loss of each completion in column 0; column 1 is the next prompt's, read for z only."""
        assert batch.reward is not None
        logratio = self.score(batch).logratio
        # Every rank takes part in the sum, also one whose micro-batch holds a single prompt.
        other = reference_point(logratio[:, 1:], batch.present[:, 1:])
        total, count = self.over_ranks(other)
        z = (total / count.clamp(min=1)).clamp(min=0)
        good = batch.reward[:, 0] > 0
        value = kto_loss(logratio[:, 0], good, z, self.beta, self.good_weight, self.bad_weight)
        implicit = self.beta * logratio[:, :1].detach()
        return Loss(value, torch.ones_like(value), implicit, {"beta": torch.tensor(self.beta), "z": z})
