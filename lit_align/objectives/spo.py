"""SPO: a soft preference loss on log-likelihoods, and a KL to the reference on samples of the policy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_align.batch import CompletionBatch, Loss, MixedBatch, completions_of
from lit_align.checks import check_start
from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check

UNBOUNDED = (
    "model.alpha and model.beta are 0: the loss is then -μ s / 2, which has no lower bound; give an alpha above 0 "
    "(0.01 is usual), or a beta above 0 for the KL regularizer on samples"
)
NO_SAMPLES = (
    "SPO's KL regularizer (model.beta is {}) is taken on samples of the policy, and this data brings none: use "
    "--data MixedData, or --model.beta 0 for the preference term alone"
)


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


def samples_kl(token_kl: Tensor) -> Tensor:
    """KL of the policy to the reference over whole sequences, estimated on the policy's own samples.

        KL̂ = mean_i sum_t KL(π_θ(·|x_i, y_i<t) ‖ π_ref(·|x_i, y_i<t)),   y_i ~ π_θ(·|x_i)
        Eq. 9 to 11 of arXiv 2405.00747, which print a sum over the samples; a mean leaves β free of their number

    Gradient flows through the KL at each prefix and not through what was sampled.

    Args:
        token_kl: KL over the vocabulary at each position in nats, 0 at padding, (n, 1, L).

    Returns:
        KL̂ in nats a sample, (), >= 0.
    """
    return token_kl.sum(-1).mean()


class SPO(AlignModule):
    """Soft preference optimization, arXiv 2405.00747: the preference term of each pair plus β KL̂.

    Trained on ``MixedData``; with ``beta`` 0 on pairs alone. An optimizer step minimizes the mean preference loss plus
    β times the mean KL of its samples. Where its micro-batches differ in size, as at the end of an epoch, the samples
    of each count by its pairs. Validation has no samples: its loss is the preference term.

    Args:
        alpha: Softness α, >= 0, usually 0.003 to 0.1; at 0 the loss has no lower bound but for β.
        beta: Weight of the KL β, >= 0, > 0 where ``alpha`` is 0; usually 0.003 to 0.1.
        gamma: Sharpness of the importance weights γ, >= 0, usually 0.01 to 0.1; 0 weights all pairs alike.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats = ("kl_samples", "mu")
    mixes = True

    def __init__(
        self,
        alpha: float = 0.01,
        beta: float = 0.01,
        gamma: float = 0.0,
        pair: PairSettings = PairSettings(),
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__(pair, optim)
        check("model.alpha", alpha, alpha >= 0, "0 or more", "0.01")
        check("model.beta", beta, beta >= 0, "0 or more", "0.01")
        check("model.gamma", gamma, gamma >= 0, "0 or more", "0.03")
        if alpha == beta == 0:
            raise UserError(UNBOUNDED)
        self.alpha, self.beta, self.gamma = alpha, beta, gamma

    def check_data(self, batch: CompletionBatch | MixedBatch) -> None:
        """The regularizer needs samples."""
        if self.beta > 0 and not isinstance(batch, MixedBatch):
            raise UserError(NO_SAMPLES.format(self.beta))

    def loss(self, batch: CompletionBatch | MixedBatch) -> Loss:
        """SPO's loss of each pair; without samples, as in validation, its preference term."""
        logps = self.score(completions_of(batch), reference=False).logps
        joint = pair_logps(logps)
        total, count = self.over_ranks(torch.stack([joint.sum(), torch.full_like(joint[0], len(joint))]))
        weight = soft_importance(logps, self.gamma, self.gamma * total / count)
        value, stats = spo_loss(logps, self.alpha, weight.to(logps.dtype)), {"mu": weight.mean()}
        if self._trainer is not None and self.trainer.training:
            self.check_data(batch)
        if self.beta > 0 and isinstance(batch, MixedBatch):
            kl = self._samples_kl(batch.samples.completions)
            value, stats["kl_samples"] = value + self.beta * kl, kl.detach()
        return Loss(value, torch.ones_like(value), (self.alpha or 1.0) * logps.detach(), stats)

    def _samples_kl(self, samples: CompletionBatch) -> Tensor:
        assert self.pair is not None
        scores = self.pair.score(samples, kl=True)
        if self.training_starts:
            check_start(scores, self.pair_settings.model)
        assert scores.token_kl is not None
        return samples_kl(scores.token_kl)
