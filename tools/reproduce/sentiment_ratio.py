"""How far a policy is from the optimal one, by answers of the reference: self-normalized importance sampling.

Of M answers y_i of the reference to a prompt,

    w_i = M · softmax_i(log π(y_i)/π_ref(y_i))

estimates π/π_ref at y_i, and for the optimal policy π* ∝ π_ref exp(r/β) the logarithm of the ratio is r/β and a
constant. A kernel density of the rewards, weighted by w, is then that of the rewards under π. arXiv 2402.00856,
Figures 3, 7 and 8.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLACES = 41
"""Rewards at which densities are given, from the smallest to the largest."""
AT_ONCE = 8
"""Answers of a prompt that are scored together."""


def importance(logratio: Tensor) -> Tensor:
    """w, whose mean over a prompt's answers is 1.

    Args:
        logratio: log π/π_ref up to a constant of the prompt, (N, M).

    Returns:
        (N, M), >= 0.
    """
    return logratio.softmax(-1) * logratio.shape[-1]


def divergences(logratio: Tensor, optimal: Tensor) -> dict[str, float]:
    """How far the optimal policy π* is from a policy π, both restricted to the answers, and how many of them count.

    The other way round these answers do not tell: where π has gone from them they miss what it does there. The policy's
    own do, by KL(π ‖ π*) = log Z - (reward - β KL(π ‖ π_ref)) / β.

    Args:
        logratio: log π/π_ref, (N, M).
        optimal: r/β, (N, M).

    Returns:
        ``forward``, KL(π* ‖ π) in nats, which tends to that of the policies themselves as M grows; ``log Z``, the
        logarithm of the mean of exp(r/β), the mean over prompts; ``policy share`` and ``optimal share``, the effective
        sample size 1/Σ(w/M)² over M: near 1/M an estimate stands on one answer.
    """
    log_p, log_q = logratio.log_softmax(-1), optimal.log_softmax(-1)
    log_z = optimal.logsumexp(-1).mean().item() - math.log(optimal.shape[-1])
    found = {"forward": (log_q.exp() * (log_q - log_p)).sum(-1).mean().item(), "log Z": log_z}
    shares = {"policy share": log_p, "optimal share": log_q}
    return found | {name: (1 / (2 * one).exp().sum(-1)).mean().item() / one.shape[-1] for name, one in shares.items()}


def density(rewards: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """Gaussian kernel density, of Silverman's width for the plain rewards, so that all policies are smoothed alike.

    Args:
        rewards: (N, M).
        weights: Of mean 1, (N, M).
        places: Rewards, (G,).

    Returns:
        (G,), whose integral over all rewards is 1.
    """
    values, counts = rewards.flatten(), weights.flatten()
    width = 1.06 * values.std() * len(values) ** -0.2
    kernel = torch.exp(-(((places[:, None] - values) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
    return (kernel * counts).mean(-1)


def curves(logratio: Tensor, rewards: Tensor, beta: float) -> dict[str, list[float]]:
    """Densities of the reward under the reference, the policy and the optimal policy, and the ratios to the first."""
    places = torch.linspace(rewards.min().item(), rewards.max().item(), PLACES, dtype=rewards.dtype)
    flat = {"reference": torch.zeros_like(rewards), "policy": logratio, "optimal": rewards / beta}
    found = {name: density(rewards, importance(one), places) for name, one in flat.items()}
    ratios = {f"{name} ratio": found[name] / found["reference"] for name in ("policy", "optimal")}
    return {"step": places.tolist(), **{name: one.tolist() for name, one in {**found, **ratios}.items()}}


def against_the_optimum(folder: Path, answers: Path, beta: float) -> dict[str, Any]:
    """Both of the above for a run, on the reference's answers in a file of ``sentiment_world``."""
    from sentiment_world import read_reference

    from lit_align.commands.arguments import Loading
    from lit_align.commands.runs import find_run, load, opened

    loaded = load(opened(find_run(str(folder)), Loading()))
    batch, rewards = read_reference(answers)
    with torch.no_grad():
        parts = [loaded.pair.score(part.to(loaded.device)).logratio.double().cpu() for part in columns(batch)]
    logratio = torch.cat(parts, 1) if parts else torch.zeros_like(rewards)
    return {"divergences": divergences(logratio, rewards / beta), "curve": curves(logratio, rewards, beta)}


def columns(batch: Any) -> list[Any]:
    """The same prompts with some answers at a time."""
    cuts = [slice(start, start + AT_ONCE) for start in range(0, batch.present.shape[1], AT_ONCE)]
    names = ("completion_ids", "completion_mask", "present")
    return [batch._replace(**{name: getattr(batch, name)[:, cut] for name in names}) for cut in cuts]
