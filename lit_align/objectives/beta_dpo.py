"""β-DPO: one β for each batch, from how its reward gaps compare with those seen so far, on the pairs near them."""

from __future__ import annotations

import logging
import math
import random
import zlib

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.metrics import Total
from lit_align.module import AlignModule
from lit_align.objectives.dpo import dpo_loss
from lit_align.settings import OptimSettings, PairSettings, check

log = logging.getLogger(__name__)

LEAST_BETA = 1e-3


def keep_probability(gap: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Relative chance of a pair to be kept: a Gaussian around the running mean of the gaps.

        w = exp(-((A - mean) / deviation)² / 2)        arXiv 2407.08639

    Args:
        gap: A = M_w - M_l of each pair in nats, (B,).
        mean: Running mean of the gaps, ().
        deviation: Running standard deviation of the gaps, (), >= 0; at 0 all pairs have the same chance.

    Returns:
        Weights, (B,), in (0, 1].
    """
    safe = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    distance = torch.where(deviation > 0, (gap - mean) / safe, torch.zeros_like(gap))
    return torch.exp(-0.5 * distance**2).clamp(min=1e-30)


def batch_beta(kept_mean: Tensor, mean: Tensor, beta: float, a: float) -> Tensor:
    """The β of a batch.

        β_b = max(1e-3, β (1 + a (mean of kept A - running mean)))        arXiv 2407.08639

    Args:
        kept_mean: Mean of A over the kept pairs of the batch, nats, ().
        mean: Running mean of the gaps, nats, ().
        beta: β, > 0.
        a: How strongly β follows the gap, >= 0; 0 keeps β.

    Returns:
        β_b, (), >= 1e-3 unless a is 0.
    """
    if a == 0:
        return torch.full_like(mean, beta)
    return (beta * (1 + a * (kept_mean - mean))).clamp(min=LEAST_BETA)


class BetaDPO(AlignModule):
    """β-DPO, arXiv 2407.08639: dynamic β with β-guided selection.

    The running mean and deviation of the gaps move once an optimizer step, from all its pairs on all ranks, and are
    corrected for their start at 0 (a departure: the authors' are not). The selection and β_b belong to the
    micro-batch of all ranks.

    Args:
        beta: β, > 0.
        a: How strongly β follows the gaps of the batch, >= 0; 0 keeps β.
        keep: Fraction of pairs kept, in (0, 1]; 1 keeps all.
        momentum: Share of the running statistics that stays at a step, in [0, 1).
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("beta",)
    running: Tensor
    corrected: Tensor

    def __init__(
        self,
        beta: float = 0.1,
        a: float = 0.6,
        keep: float = 0.8,
        momentum: float = 0.9,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "0.1")
        check("model.a", a, a >= 0, "0 or more", "0.6")
        check("model.keep", keep, 0 < keep <= 1, "in (0, 1]", "0.8")
        check("model.momentum", momentum, 0 <= momentum < 1, "in [0, 1)", "0.9")
        self.beta, self.a, self.keep, self.momentum = beta, a, keep, momentum
        self.register_buffer("running", torch.zeros(2, dtype=torch.float64))  # of the gap and its square
        self.register_buffer("corrected", torch.zeros((), dtype=torch.float64))  # 1 - momentum^steps
        self.step_gap, self.step_square = Total(), Total()
        self._told = False

    def moments(self) -> tuple[Tensor, Tensor]:
        """Running mean and standard deviation of the gaps, () each, corrected for their start at 0."""
        mean, square = self.running / self.corrected.clamp(min=1e-12)
        return mean, (square - mean**2).clamp(min=0).sqrt()

    def loss(self, batch: CompletionBatch) -> Loss:
        """DPO's loss of the kept pairs at the batch's β; the others weigh 0."""
        logratio = self.score(batch).logratio
        gap = (logratio[:, 0] - logratio[:, 1]).detach().double()
        mean, deviation = self.moments()
        chance = keep_probability(gap, mean, deviation)
        keep = self._select(chance, batch) if self.training else torch.ones_like(gap).bool()
        totals = self.over_ranks(torch.stack([gap[keep].sum(), keep.sum().double()]))
        beta = batch_beta(totals[0] / totals[1], mean, self.beta, self.a)
        if self.training:
            self.step_gap.update(gap)
            self.step_square.update(gap**2)
        value = dpo_loss(logratio, beta.to(logratio.dtype))
        implicit = beta.to(logratio.dtype) * logratio.detach()
        return Loss(value, keep.to(value.dtype), implicit, {"beta": beta})

    def adapt(self) -> None:
        """Move the running statistics by the gaps of the optimizer step."""
        (gap, count), (square, _) = self.step_gap.compute(), self.step_square.compute()
        fresh = torch.stack([gap, square]) / count
        self.running.copy_(self.momentum * self.running + (1 - self.momentum) * fresh)
        self.corrected.copy_(self.momentum * self.corrected + (1 - self.momentum))
        self.step_gap.reset()
        self.step_square.reset()

    def _select(self, weight: Tensor, batch: CompletionBatch) -> Tensor:
        """Draw the kept fraction of all ranks' pairs without replacement, at least one; this rank's, bool (B,)."""
        # Drawn from where the run is and from the pair itself: not from its place in the batch, and not from its rank.
        place = f"{self.global_step}/{self.step_gap.update_count}"
        own = torch.tensor([gumbel(f"{place}/{name}") for name in names_of(batch)], dtype=weight.dtype)
        keys = weight.log().nan_to_num(-math.inf) + own.to(weight.device)
        everywhere = self.from_ranks(keys)
        count = max(1, round(self.keep * len(everywhere)))
        if count == len(everywhere) and self.keep < 1 and not self._told:
            log.warning(
                "model.keep=%g drops none of a micro-batch of %d pairs: raise data.batch_size", self.keep, count
            )
            self._told = True
        return keys >= everywhere.sort(descending=True).values[count - 1]


def names_of(batch: CompletionBatch) -> list[str]:
    """A name of each group by its row and its tokens: a row may have several pairs."""
    tokens = [ids[mask].tolist() for ids, mask in zip(batch.completion_ids, batch.completion_mask, strict=True)]
    return [f"{row} {zlib.crc32(str(ids).encode())}" for row, ids in zip(batch.row.tolist(), tokens, strict=True)]


def gumbel(name: str) -> float:
    """A number of the standard Gumbel distribution, a function of the name alone.

    Taking the pairs of the largest log w + Gumbel draws them without replacement, each time in proportion to w.
    """
    return -math.log(-math.log(random.Random(name).uniform(1e-300, 1)))
