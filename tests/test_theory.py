"""The theorems behind the losses, in float64 on tabular policies. Expected values are the mathematics, not our code."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lit_align.objectives.dpo_rw import dpo_rw_loss
from lit_align.objectives.exo import exo_loss, reward_target

V = 3
BETA, REWARD_BETA = 0.6, 0.7
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REWARD = torch.tensor([0.2, 1.0, -0.4], dtype=torch.float64)
LOGITS = torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64)


def multisets(size: int) -> tuple[Tensor, Tensor]:
    """Every multiset of ``size`` draws of V outcomes as indices (N, size), and its probability under REFERENCE (N,)."""
    columns, chances = [], []
    for first in range(size + 1):
        for second in range(size + 1 - first):
            counts = torch.tensor([first, second, size - first - second])
            columns.append(torch.arange(V).repeat_interleave(counts))
            ways = math.lgamma(size + 1) - sum(math.lgamma(int(n) + 1) for n in counts)
            chances.append(math.exp(ways + float((counts * REFERENCE.log()).sum())))
    return torch.stack(columns), torch.tensor(chances, dtype=torch.float64)


def gradient(objective: Callable[[Tensor], Tensor]) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    (found,) = torch.autograd.grad(objective(logits.log_softmax(-1)), logits)
    return found


def expected_loss(loss: Callable[..., Tensor], size: int) -> Callable[[Tensor], Tensor]:
    """The exact expectation of a group loss over K = ``size`` completions drawn from the reference."""
    chosen, chance = multisets(size)
    target = reward_target(REWARD[chosen], REWARD_BETA, torch.ones_like(chosen).bool())
    return lambda logps: (chance * loss((logps - REFERENCE.log())[chosen], target, BETA)).sum()


def tempered(logps: Tensor) -> Tensor:
    """log π_θ^{β_π} ∝ π_θ^β π_ref^{1-β}."""
    return (BETA * logps + (1 - BETA) * REFERENCE.log()).log_softmax(-1)


OPTIMAL = (REFERENCE.log() + REWARD / REWARD_BETA).log_softmax(-1)


def reverse_kl(logps: Tensor) -> Tensor:
    return (tempered(logps).exp() * (tempered(logps) - OPTIMAL)).sum()


def forward_kl(logps: Tensor) -> Tensor:
    return (OPTIMAL.exp() * (OPTIMAL - tempered(logps))).sum()


@pytest.mark.parametrize(
    ("loss", "divergence"), [(exo_loss, reverse_kl), (dpo_rw_loss, forward_kl)], ids=["EXO", "DPO-rw"]
)
def test_the_gradient_tends_to_that_of_the_divergence_and_its_bias_falls_as_one_over_k(
    loss: Callable[..., Tensor], divergence: Callable[[Tensor], Tensor]
) -> None:
    """Theorems 3.2 and 3.3 of arXiv 2402.00856: EXO is the reverse KL, DPO-rw the forward KL, as K grows."""
    limit = gradient(divergence)
    found = {size: gradient(expected_loss(loss, size)) for size in (8, 16, 32, 64)}
    bias = [(value - limit).norm() for value in found.values()]
    assert [float(later / earlier) for earlier, later in pairwise(bias)] == pytest.approx([0.5] * 3, abs=0.05)
    extrapolated = 2 * found[64] - found[32]  # free of the 1/K term
    assert (extrapolated - limit).norm() < 2e-3 * limit.norm()


def test_the_two_limits_differ() -> None:
    reverse, forward = gradient(reverse_kl), gradient(forward_kl)
    assert (reverse - forward).norm() > 0.1 * forward.norm()


@pytest.mark.parametrize("target", [REWARD.log_softmax(-1), LOGITS.log_softmax(-1)])
def test_gradients_of_both_divergences_over_all_outcomes(target: Tensor) -> None:
    """With every outcome as a column and β = 1: ∂KL(q‖p) = p - q, ∂KL(p‖q) = p (log p/q - KL)."""
    p, q = LOGITS.softmax(-1), target.exp()

    def at_once(loss: Callable[..., Tensor]) -> Tensor:
        return gradient(lambda logps: loss(logps[None], target[None], 1.0).sum())

    torch.testing.assert_close(at_once(dpo_rw_loss), p - q)
    kl = (p * (p / q).log()).sum()
    torch.testing.assert_close(at_once(exo_loss), p * ((p / q).log() - kl))


def test_the_step_of_the_reverse_divergence_is_larger_beyond_the_logarithmic_mean() -> None:
    """One step from p_1 = p_2 = p: the reverse KL moves log p_1/p_2 more than the forward KL exactly if p exceeds
    the logarithmic mean of q_1 and q_2 (the sharpened case 1 of Theorem E.5 of arXiv 2404.14367)."""
    q = torch.tensor([0.5, 0.1], dtype=torch.float64)
    mean = ((q[0] - q[1]) / (q[0].log() - q[1].log())).item()
    for p, larger in ((0.95 * mean, False), (1.05 * mean, True)):
        probability = torch.tensor([p, p, 1 - 2 * p], dtype=torch.float64)
        target = torch.cat([q, 1 - q.sum()[None]])
        steps = []
        for loss in (exo_loss, dpo_rw_loss):
            logits = probability.log().requires_grad_()
            (found,) = torch.autograd.grad(loss(logits.log_softmax(-1)[None], target.log()[None], 1.0).sum(), logits)
            steps.append((found[1] - found[0]).item())
        reverse, forward = steps
        assert (reverse > forward) == larger
