"""SPO's preference term: a soft preference loss on log-likelihoods, without a reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_align.batch import CompletionBatch, Loss
from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def spo_loss(logps: Tensor, alpha: float, weight: Tensor | float = 1.0) -> Tensor:
    """Negative log-likelihood of the preference under the policy's own α-softened odds, scaled by 1/α.

        L = (μ/α) log(1 + exp(-α s)),   s = log π_θ(y_w|x) - log π_θ(y_l|x)        Eq. 8 of arXiv 2405.00747
        α = 0 is its gradient's limit, L = -μ s / 2, which is unbounded below

    Args:
        logps: log π_θ of the chosen and the rejected completion in nats, (B, 2).
        alpha: Softness α, >= 0; on a tabular policy the fixed point is softmax(r/α).
        weight: μ, a constant weight of each pair, (B,) or a number, >= 0.

    Returns:
        The loss of each pair in nats, (B,); > 0 for α > 0.
    """
    gap = logps[:, 0] - logps[:, 1]
    return weight * (-gap / 2 if alpha == 0 else F.softplus(-alpha * gap) / alpha)


def soft_importance(logps: Tensor, gamma: float, center: Tensor) -> Tensor:
    """Weights that favour pairs the policy is likely to write.

        μ = σ(γ log(π_w + π_l) - c)        Eq. 24 of arXiv 2405.00747

    Args:
        logps: log π_θ of both completions in nats, (B, 2).
        gamma: Sharpness γ, >= 0; 0 gives every pair the weight 1 (a departure from σ(0) = 1/2, a mere scale).
        center: c, the mean of γ log(π_w + π_l) over the batch, ().

    Returns:
        μ, (B,), in (0, 1), without gradient.
    """
    if gamma == 0:
        return torch.ones_like(logps[:, 0])
    return torch.sigmoid(gamma * pair_logps(logps) - center)


def pair_logps(logps: Tensor) -> Tensor:
    """log(π_w + π_l) in float32 or wider, (B,), without gradient."""
    wide = logps.detach() if logps.dtype == torch.float64 else logps.detach().float()
    return torch.logaddexp(wide[:, 0], wide[:, 1])


class SPO(AlignModule):
    """Soft preference optimization, arXiv 2405.00747: its preference term.

    The regularizer, a KL on samples of the policy, is not part of this version, so ``alpha`` must be above 0: without
    the regularizer the loss at 0 has no lower bound.

    Args:
        alpha: Softness α, > 0.
        gamma: Sharpness of the importance weights γ, >= 0; 0 weights all pairs alike.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    def __init__(
        self,
        alpha: float = 0.01,
        gamma: float = 0.0,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        if alpha == 0:
            raise UserError(
                "model.alpha is 0: the loss is then -μ s / 2, which has no lower bound without the KL regularizer on "
                "samples, and this version has none; give an alpha above 0 (0.01 is usual)"
            )
        check("model.alpha", alpha, alpha > 0, "greater than 0", "0.01")
        check("model.gamma", gamma, gamma >= 0, "0 or more", "0.03")
        self.alpha = alpha
        self.gamma = gamma

    def loss(self, batch: CompletionBatch) -> Loss:
        """SPO's loss of each pair."""
        logps = self.score(batch, reference=False).logps
        joint = pair_logps(logps)
        total, count = self.over_ranks(torch.stack([joint.sum(), torch.full_like(joint[0], len(joint))]))
        weight = soft_importance(logps, self.gamma, self.gamma * total / count)
        value = spo_loss(logps, self.alpha, weight.to(logps.dtype))
        return Loss(value, torch.ones_like(value), self.alpha * logps.detach(), {})
