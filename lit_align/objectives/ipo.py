"""IPO: regress the log-ratio margin onto a fixed target instead of pushing it without bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.objectives.reward_model import better_pairs
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


def over_pairs(loss: Callable[[Tensor], Tensor], logratio: Tensor, better: Tensor) -> tuple[Tensor, Tensor]:
    """A loss of pairs over all ordered pairs of each group.

    Args:
        loss: From log-ratios of better and worse (N, 2) to one value for each pair (N,).
        logratio: log π_θ/π_ref of each completion in nats, (B, K).
        better: Which completion i is better than which j, bool (B, K, K).

    Returns:
        The mean over each group's pairs (B,), 0 where there is none; how many there are, (B,).
    """
    group, first, second = better.nonzero(as_tuple=True)
    values = loss(torch.stack([logratio[group, first], logratio[group, second]], -1))
    count = better.sum((1, 2)).to(values.dtype)
    return values.new_zeros(len(better)).index_add(0, group, values) / count.clamp(min=1), count


class IPO(AlignModule):
    """Identity preference optimization, arXiv 2310.12036.

    A group of more than two completions counts as all its pairs of unequal reward, as the on-policy study has it, or of
    unequal column where there are no rewards; each completion is scored once.

    Args:
        tau: Strength of the regularization τ, > 0: the margin aimed at is 1/(2τ) nats.
        length_average: Divide each log-ratio by its completion's tokens first, so that the target is nats a token;
            the paper, and the default, sum.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    columns = (2, 2**31)

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
        """IPO's loss of each pair, or the mean over the pairs of each group, which count as many."""
        scores = self.score(batch)
        logratio = scores.logratio / scores.lengths.clamp(min=1) if self.length_average else scores.logratio
        columns = torch.arange(logratio.shape[1], 0, -1, device=logratio.device).expand_as(logratio)
        targets = columns if batch.reward is None else batch.reward
        better = better_pairs(targets, batch.present)
        value, weight = over_pairs(partial(ipo_loss, tau=self.tau), logratio, better)
        return Loss(value, weight, self.tau * logratio.detach(), {})
