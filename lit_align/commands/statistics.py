"""What is said of candidates that answered the same prompts: means, win rates, best of N. Pure functions.

A candidate has some answers to each prompt and weights over them that add up to 1: 1/K for plain sampling, the chance
of being kept for best of N. Prompts are the independent units, so every standard error is taken over prompts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ITERATIONS = 200
LEAST_PROMPTS = 3
"""Prompts below which two coefficients cannot be told from noise."""


class Candidate(NamedTuple):
    """Answers of one candidate to N prompts.

    Attributes:
        name: As it is shown.
        reward: float64 (N, K); NaN where a prompt has none.
        tokens: Length of each answer, float64 (N, K).
        weight: How much each answer counts, float64 (N, K), each row adding up to 1.
        ended: Whether it ended by itself, float64 (N, K); None where that is not known.
        kl: KL(policy ‖ reference) of each answer in nats, float64 (N, K), or None.
    """

    name: str
    reward: Tensor
    tokens: Tensor
    weight: Tensor
    ended: Tensor | None = None
    kl: Tensor | None = None


class Estimate(NamedTuple):
    """A value and its standard error over prompts, None where there is only one."""

    mean: float
    standard_error: float | None

    def __format__(self, digits: str) -> str:
        """``mean ± standard error``, both in the format of a number such as ``.3f``."""
        return f"{self.mean:{digits}}" + ("" if self.standard_error is None else f" ± {self.standard_error:{digits}}")


def over_prompts(values: Tensor) -> Estimate:
    """Mean of one value per prompt and its standard error, sd / sqrt(N).

    Args:
        values: (N,), N >= 1.
    """
    error = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None
    return Estimate(values.mean().item(), error)


def best_of(reward: Tensor, n: int) -> Tensor:
    """Chance of each of K draws to be the best of n, taken from the K without replacement.

        w_(i) = C(i - 1, n - 1) / C(K, n) for the draw of rank i, the worst having rank 1

    The estimator of WebGPT (arXiv 2112.09332): unbiased for the best of n fresh draws, and the mean over all
    subsets. Equal rewards share their weights. With n = K the best draw has all of it.

    Args:
        reward: float (N, K).
        n: Draws of which the best is kept, in [1, K].

    Returns:
        Weights, float64 (N, K), each row adding up to 1.
    """
    columns = reward.shape[1]
    by_rank = [math.comb(i, n - 1) / math.comb(columns, n) for i in range(columns)]
    ranked = torch.tensor(by_rank, dtype=torch.float64).expand(reward.shape)
    weight = torch.zeros_like(ranked).scatter(1, reward.argsort(1), ranked)
    equal = (reward[:, :, None] == reward[:, None, :]).double()
    return ((equal / equal.sum(-1, keepdim=True).clamp(min=1)) @ weight[..., None]).squeeze(-1)


def best_of_kl(n: int) -> float:
    """KL of the best of n draws to one draw, in nats.

        log n - (n - 1) / n

    Exact where no two rewards are equal, else an upper bound (arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


class Comparison(NamedTuple):
    """How often one candidate's answer is better than another's to the same prompt.

    Attributes:
        first: Name of the candidate.
        second: Name of the one it is compared with.
        prompts: Prompts that both have rewards for.
        win_rate: Share of wins, a tie counting ½, in [0, 1].
        ties: Share of ties.
        length_controlled: The win rate at equal lengths, see ``length_controlled``; None where it cannot be told.
        longer: Mean tokens of the first less those of the second.
    """

    first: str
    second: str
    prompts: int
    win_rate: Estimate
    ties: float
    length_controlled: Estimate | None
    longer: float


def compared(first: Candidate, second: Candidate) -> Comparison | None:
    """Compare two candidates that drew independently of each other, every answer of one with every one of the other.

    Args:
        first: (N, K).
        second: The same N prompts, (N, K').

    Returns:
        The comparison over the prompts where all rewards are known; None if there are none.
    """
    there = ~(first.reward.isnan().any(1) | second.reward.isnan().any(1))
    if not there.any():
        return None
    better = (first.reward[there, :, None] - second.reward[there, None, :]).sign().flatten(1)
    weight = (first.weight[there, :, None] * second.weight[there, None, :]).flatten(1)
    longer = (first.tokens[there, :, None] - second.tokens[there, None, :]).flatten(1)
    outcome = (better + 1) / 2
    return Comparison(
        first=first.name,
        second=second.name,
        prompts=int(there.sum()),
        win_rate=_win_rate((outcome * weight).sum(1)),
        ties=((better == 0) * weight).sum(1).mean().item(),
        length_controlled=length_controlled(outcome, longer, weight),
        longer=(longer * weight).sum(1).mean().item(),
    )


def length_controlled(outcome: Tensor, longer: Tensor, weight: Tensor) -> Estimate | None:
    """The win rate there would be if both answers were of the same length.

        logit P(win) = a + b · tanh(d / sd(d)),   d = tokens of the first - tokens of the second
        the length-controlled win rate is σ(a), which is P(win) at d = 0

    After AlpacaEval 2's (arXiv 2404.04475), with two departures: there is no term for the difficulty of a prompt, whose
    coefficients need many models on the same prompts, and in the place of its L2 penalty stands Jeffreys' prior
    (Firth 1993, Biometrika 80), under which the estimate is finite also where one side wins everywhere or length alone
    tells the winner. Swapping the two candidates gives the complement, and a candidate against itself ½.

    Args:
        outcome: 1 for a win, ½ for a tie, 0 for a loss, float64 (N, P), P pairs of answers to each of N prompts.
        longer: d, tokens, float64 (N, P).
        weight: How much each pair counts, float64 (N, P), each row adding up to 1.

    Returns:
        σ(a), its standard error by the sandwich estimator with prompts as clusters; None for fewer than three prompts,
        and where one side is longer by the same number of tokens everywhere, so that length and merit cannot be told
        apart.
    """
    mean = (longer * weight).sum() / weight.sum()
    spread = ((longer - mean) ** 2 * weight).sum().div(weight.sum()).sqrt()
    if len(outcome) < LEAST_PROMPTS or (spread == 0 and mean != 0):
        return None
    columns = [torch.ones_like(longer)] + ([torch.tanh(longer / spread)] if spread > 0 else [])
    design = torch.stack(columns, -1)
    found = _firth(design.flatten(0, 1), outcome.flatten(), weight.flatten())
    if found is None:
        return None
    coefficients, inverse = found
    residual = weight * (outcome - torch.sigmoid(design @ coefficients))
    score = (design * residual[..., None]).sum(1)
    n = len(score)
    variance = inverse @ (score.T @ score) @ inverse * (n / (n - 1))
    if _one_sided((outcome * weight).sum(1)):
        variance = inverse  # residuals that all but vanish say nothing of the error
    rate = torch.sigmoid(coefficients[0]).item()
    return Estimate(rate, rate * (1 - rate) * variance[0, 0].sqrt().item())


def _win_rate(shares: Tensor) -> Estimate:
    """Mean of the shares of wins (N,); the error of Jeffreys' estimate where one side wins everywhere."""
    estimate = over_prompts(shares)
    if len(shares) > 1 and _one_sided(shares):
        n = len(shares)
        guess = (n + 0.5) / (n + 1)
        return estimate._replace(standard_error=math.sqrt(guess * (1 - guess) / n))
    return estimate


def _one_sided(shares: Tensor) -> bool:
    return bool((shares > 1 - 1e-9).all() or (shares < 1e-9).all())


def _firth(design: Tensor, outcome: Tensor, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Logistic regression under Jeffreys' prior, by Newton's method on Firth's score.

        U = sum_i x_i [w_i (y_i - p_i) + h_i (½ - p_i)],   h_i = w_i p_i (1 - p_i) x_i' I^-1 x_i

    Args:
        design: x, float64 (M, C).
        outcome: y in [0, 1], (M,).
        weight: w >= 0, (M,).

    Returns:
        Coefficients (C,) and the inverse information (C, C); None if the search does not settle.
    """
    coefficients = design.new_zeros(design.shape[1])
    for _ in range(ITERATIONS):
        chance = torch.sigmoid(design @ coefficients)
        spread = weight * chance * (1 - chance)
        information = design.T @ (spread[:, None] * design)
        inverse, failed = torch.linalg.inv_ex(information)
        if failed or not inverse.isfinite().all():
            return None
        leverage = spread * ((design @ inverse) * design).sum(1)
        step = inverse @ (design.T @ (weight * (outcome - chance) + leverage * (0.5 - chance)))
        if step.abs().max() < 1e-9:
            return coefficients, inverse
        coefficients = coefficients + step / max(1.0, step.abs().max().item())
    return None
