"""What rows of logits say of their tokens, and how that moves with the logits.

The slope of a score is the same whatever a loss makes of the score, so it can be worked out while the logits are there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FAR = 20.0
"""Nats by which a mixture may move a logit for its normaliser to be had from the policy's own weights in float32."""


@dataclass(frozen=True)
class Asked:
    """Which scores are wanted beside log-probs.

    Attributes:
        epsilon: Perturbation ε of the mixtures, >= 0; None leaves them out.
        kl: Whether to compute the full-vocabulary KL, both ways.
        entropy: Whether to compute the policy's entropy.
        slopes: Whether the slopes of log-prob, KL and entropy are wanted.
    """

    epsilon: float | None = None
    kl: bool = False
    entropy: bool = False
    slopes: bool = False


def pick(scores: Tensor, targets: Tensor) -> Tensor:
    """Log-softmax of each row at its target.

    Args:
        scores: Logits, (t, V).
        targets: Token ids, int64 (t,).

    Returns:
        Nats, (t,).
    """
    return _at(scores, targets, _normalised(scores)[2])


def score_rows(
    policy: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    entropy_slope: Tensor | None,
    bend: Tensor | None,
    asked: Asked,
) -> tuple[Tensor | None, ...]:
    """Scores of rows of logits, which are overwritten by slopes.

    With p = softmax(f): d log p_y / df = 1_y - p;  d KL / df = p (log p - log q - KL);  d H / df = -p (log p + H).
    Where ``asked.slopes``, the first comes to stand in ``policy``, the second in ``reference`` if the KL is asked for,
    the third in ``entropy_slope``.

    Args:
        policy: The policy's logits f, (t, V).
        targets: Token ids, int64 (t,).
        reference: The reference's logits, (t, V), or None.
        entropy_slope: Where the entropy's slope goes, (t, V); None unless that is asked for.
        bend: What the slopes are multiplied with to pass a soft cap, (t, V), or None without one.
        asked: Which scores.

    Returns:
        In nats, (t,) each or None: log-prob of the policy and of the reference, both mixtures (outward, inward),
        KL(π ‖ π_ref), entropy, KL(π_ref ‖ π).
    """
    weights, total, log_z, top = _normalised(policy)
    logps = _at(policy, targets, log_z)
    reference_logps = outward = inward = kl = entropy = forward_kl = None
    if reference is not None:
        others, other_total, other_log_z, _ = _normalised(reference)
        reference_logps = _at(reference, targets, other_log_z)
        gap = policy - reference
        if asked.epsilon is not None:
            outward, inward = _mixed(policy, targets, gap, asked.epsilon, weights, top)
        if asked.kl:
            gap -= log_z - other_log_z
            forward_kl = -(others.mul_(gap).sum(-1) / other_total[:, 0])
            kl = torch.mul(weights, gap, out=others).sum(-1) / total[:, 0]
            if asked.slopes:
                _bent(torch.mul(weights / total, gap - kl[:, None], out=reference), bend)
    if asked.entropy:
        log_p = policy - log_z
        entropy = -((weights * log_p).sum(-1) / total[:, 0])
        if entropy_slope is not None:
            _bent(torch.mul(weights / -total, log_p + entropy[:, None], out=entropy_slope), bend)
    if asked.slopes:
        torch.div(weights, -total, out=policy)
        _bent(policy.scatter_add_(1, targets[:, None], torch.ones_like(total)), bend)
    return logps, reference_logps, outward, inward, kl, entropy, forward_kl


def _mixed(
    scores: Tensor, targets: Tensor, gap: Tensor, epsilon: float, weights: Tensor, top: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-softmax of f + ε g and of f - ε g at the targets, (t,) each.

    The normaliser of the first is that of w exp(ε g), with w = exp(f - top) at hand, so one exponential does for both.
    Equal models have g = 0, and the same sum as the policy's own normaliser then gives the same bits.

    Args:
        scores: f, (t, V).
        targets: Token ids, int64 (t,).
        gap: g = f - f_ref, (t, V).
        epsilon: ε, >= 0.
        weights: w, (t, V).
        top: Largest of each row of f, (t, 1).
    """
    if scores.is_cuda or epsilon * max(abs(one) for one in gap.aminmax()) > FAR:  # to look would halt a GPU
        step = gap * epsilon
        return pick(scores + step, targets), pick(scores - step, targets)
    here, step = _picked(scores, targets), _picked(gap, targets) * epsilon
    tilt = (gap * epsilon).exp_()
    outward = (weights * tilt).sum(-1).log() + top[:, 0]
    inward = torch.div(weights, tilt, out=tilt).sum(-1).log() + top[:, 0]
    return here + step - outward, here - step - inward


def _normalised(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The softmax of each row before it is divided by its sum, (t, V); that sum, log of the normaliser, the largest.

    One function for all: equal logits give bit-equal log-probs wherever they come from.
    """
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    return weights, total, total.log() + top, top


def _at(scores: Tensor, targets: Tensor, log_z: Tensor) -> Tensor:
    return _picked(scores, targets) - log_z[:, 0]


def _picked(scores: Tensor, targets: Tensor) -> Tensor:
    return scores.gather(1, targets[:, None])[:, 0]


def _bent(slope: Tensor, bend: Tensor | None) -> Tensor:
    return slope if bend is None else slope.mul_(bend)
