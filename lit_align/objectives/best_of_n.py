"""Best-of-N: likelihood of the best completion of each prompt and, as an option, unlikelihood of the others."""

from __future__ import annotations

import math

from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def best_of_n_loss(
    logps: Tensor, worse: Tensor, negative_coef: float, threshold: float, relative: bool = True
) -> Tensor:
    """Raise the best completion, lower the others as long as they are not yet unlikely, beside it or in themselves.

        L = -log π_θ(y_best|x) + β Σ_{j≠best} 1[π_θ(y_j|x) / π_θ(y_best|x) > δ] log π_θ(y_j|x)

    arXiv 2404.14367, which puts the threshold on π_θ(y_j|x) itself and gives no value; the ratio to the best is what
    its authors' code has, since the probability of a text shrinks with its length. No gradient goes through the
    comparison.

    Args:
        logps: log π_θ of each completion in nats, best first, (B, K).
        worse: Which columns are worse than the best one, bool (B, K); False in column 0.
        negative_coef: Weight of the others β, >= 0; 0 is best-of-N without a negative gradient.
        threshold: δ, >= 0.
        relative: Whether δ bounds the ratio to the best; False bounds π_θ(y_j|x).

    Returns:
        The loss of each group in nats, (B,).
    """
    compared = (logps - logps[:, :1] if relative else logps).detach()
    lowered = worse & (compared > (math.log(threshold) if threshold > 0 else -math.inf))
    return -logps[:, 0] + negative_coef * logps.masked_fill(~lowered, 0).sum(-1)


def worse_columns(reward: Tensor | None, present: Tensor) -> Tensor:
    """Which columns are worse than the first: all others without rewards, else those of a smaller reward.

    Args:
        reward: External reward, best first, (B, K), or None.
        present: Which columns are there, bool (B, K).

    Returns:
        bool (B, K).
    """
    others = present.clone()
    others[:, 0] = False
    return others if reward is None else others & (reward < reward[:, :1])


class BestOfN(AlignModule):
    """Best-of-N of arXiv 2404.14367, iterated when the completions are drawn by the policy as it learns.

    The best completion is the one in the first column. Completions as good as it are neither raised nor lowered, and a
    group of several that are all equally good has no best one and is left out.

    Where ratios are compared and β times the number of worse completions exceeds 1, the loss has no lower bound: a
    group's completions can lose likelihood together without end. β = 1/(N - 1) bounds it, by log δ, and a threshold on
    the likelihood itself by β (N - 1) log δ.

    Args:
        negative_coef: Weight of the other completions' log-likelihood β, >= 0; the paper's negative gradient has 1.
        threshold: Probability beside the best completion's below which another is no longer lowered, >= 0.
        relative: False reads the threshold as the probability itself, as the paper does; it shrinks with the length.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    columns = (1, 2**31)

    def __init__(
        self,
        negative_coef: float = 0.0,
        threshold: float = 0.01,
        relative: bool = True,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.negative_coef", negative_coef, negative_coef >= 0, "0 or more", "1")
        check("model.threshold", threshold, threshold >= 0, "0 or more", "0.01")
        self.negative_coef = negative_coef
        self.threshold = threshold
        self.relative = relative

    def check_data(self, batch: CompletionBatch) -> None:
        """A negative gradient needs others than the best."""
        if self.negative_coef > 0 and batch.present.sum(-1).max() < 2:
            raise UserError(
                f"model.negative_coef is {self.negative_coef}, and every prompt has one completion, so there are no "
                "others to lower: set data.select to ranked, or model.negative_coef to 0"
            )

    def loss(self, batch: CompletionBatch) -> Loss:
        """Best-of-N's loss of each group."""
        logps = self.score(batch, reference=False).logps
        worse = worse_columns(batch.reward, batch.present)
        value = best_of_n_loss(logps, worse, self.negative_coef, self.threshold, self.relative)
        alone = batch.present.sum(-1) == 1
        return Loss(value, (worse.any(-1) | alone).to(value.dtype), None, {})
