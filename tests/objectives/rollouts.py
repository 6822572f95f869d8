"""What tests of objectives that read a Rollout share: a policy small enough to enumerate, and annotated buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Rollout
from lit_align.module import AlignModule
from lit_align.settings import PairSettings
from tests.objectives.contract import random_groups

LOGITS = torch.tensor([[0.4, -0.3, 0.1], [1.0, 0.2, -0.7], [-0.5, 0.3, 0.6]], dtype=torch.float64)
"""A policy of three tokens, the last of which ends a text of at most two: logits after nothing, token 0, token 1."""

REFERENCE = torch.tensor([[0.1, 0.5, -0.2], [-0.3, 0.9, 0.4], [0.8, -0.1, 0.0]], dtype=torch.float64)

REWARD = torch.tensor([0.3, -1.1, 2.0, 0.8, 0.0, -0.4, 1.3], dtype=torch.float64)
"""Of each of the seven texts."""


def sequence_logps(logits: Tensor) -> Tensor:
    """log π of every text there is: the end alone, 0 and any token, 1 and any token, (7,)."""
    first, after_0, after_1 = logits.log_softmax(-1)
    return torch.cat([first[2:], first[0] + after_0, first[1] + after_1])


def gradient(objective: Callable[[Tensor], Tensor], at: Tensor = LOGITS) -> Tensor:
    """The gradient by the logits of a function of all texts' log-probs."""
    logits = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(objective(sequence_logps(logits)), logits)
    return found


def expected_gradient(loss: Callable[[Tensor, Tensor], Tensor], size: int) -> Tensor:
    """The exact mean of a loss's gradient over all buffers of ``size`` completions of one prompt, drawn by the policy.

    Args:
        loss: Log-probs and texts (N, size) to the loss of each completion, (N, size).
        size: Completions of a buffer.
    """

    def mean(logps: Tensor) -> Tensor:
        drawn = torch.cartesian_prod(*[torch.arange(7)] * size).view(-1, size)
        chance = logps.detach()[drawn].sum(-1).exp()
        return (chance * loss(logps[drawn], drawn).mean(-1)).sum()

    return gradient(mean)


def judged(count: int, columns: int, seed: int = 0) -> CompletionBatch:
    """Random groups with random rewards, in no order."""
    reward = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed + 10))
    return random_groups(count, columns, seed)._replace(reward=reward)


def moved(kind: type[AlignModule], model: str, **options: Any) -> AlignModule:
    """A module whose policy is no longer its reference."""
    module = kind(pair=PairSettings(model), **options)
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)
    return module


def learned(module: AlignModule, parts: list[Rollout]) -> tuple[float, float, Tensor]:
    """Summed loss, summed weight and gradient of annotated minibatches."""
    module.zero_grad()
    value = weight = 0.0
    for part in parts:
        loss = module.loss(part)
        total = (loss.value * loss.weight).sum()
        total.backward()
        value, weight = value + total.item(), weight + loss.weight.sum().item()
    found = [p.grad.flatten() for p in module.parameters() if p.requires_grad and p.grad is not None]
    return value, weight, torch.cat(found)


def assert_the_buffer_is_what_counts(module: AlignModule) -> None:
    """Order, cut, padding, and a group whose reward failed change neither loss nor gradient of an annotated buffer."""
    buffer = Rollout(judged(7, 3))
    value, weight, expected = learned(module, [module.annotate(buffer)])
    assert weight > 0
    assert expected.abs().max() > 1e-4
    place = torch.tensor([4, 1, 6, 0, 3, 5, 2])
    shuffled = module.annotate(buffer.rows(place).take(torch.arange(7), torch.tensor([[2, 0, 1]] * 7)))
    wider = module.annotate(buffer.take(torch.arange(7), torch.tensor([[0, 1, 2, -1]] * 7)))
    failed = judged(1, 3, seed=5)
    failed = failed._replace(present=torch.zeros(1, 3, dtype=torch.bool))
    more = CompletionBatch._make(torch.cat(pair) for pair in zip(buffer.completions, failed, strict=True))  # type: ignore[arg-type]
    for parts in (
        [shuffled],
        [shuffled.rows(slice(0, 1)), shuffled.rows(slice(1, 5)), shuffled.rows(slice(5, 7))],
        [wider],
        [module.annotate(Rollout(more))],
    ):
        found = learned(module, parts)
        torch.testing.assert_close(torch.tensor(found[:2]), torch.tensor([value, weight]), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found[2], expected, atol=1e-4, rtol=1e-3)
