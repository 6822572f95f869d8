"""Log-probabilities, mixtures, token KL and entropy of completion tokens, without a (tokens, vocabulary) tensor.

The vocabulary head runs on a few positions at a time. Forward keeps for each token its scores, and of each score that
carries gradient its slope with respect to the hidden state; backward multiplies these slopes and nothing else. Both
models' hidden states are at hand in the same sweep, so what compares their distributions costs one pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_align.slopes import Asked, pick, score_rows

CHUNK_ELEMENTS = 2**24
"""Logits that live together, of one model or of both: 64 MiB in float32, whatever the vocabulary. On a GPU a few
temporary tensors of that size come on top."""

BLOCK_ELEMENTS = 2**18
"""Logits handled together on a CPU once they are formed: 1 MiB, about what stays in its cache."""


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: softcap · tanh(scale · (h Wᵀ + b) / softcap) / temperature.

    Attributes:
        weight: Output embedding, (V, H), frozen.
        bias: Output bias, (V,), frozen, or None.
        scale: The model's own multiplier of the logits.
        softcap: Bound of the logits' soft cap, > 0, or None without one.
        temperature: Divides the final logits, > 0.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class TokenScores(NamedTuple):
    """One number per completion token for each quantity asked for, (T,) each; None where not asked for.

    Attributes:
        logps: log π(y_t), nats.
        reference_logps: log π_ref(y_t), nats.
        outward: log-prob under softmax((1 + ε) f - ε f_ref), nats, no gradient.
        inward: log-prob under softmax((1 - ε) f + ε f_ref), nats, no gradient.
        kl: KL(π ‖ π_ref) over the vocabulary, nats.
        entropy: Entropy of π, nats.
        forward_kl: KL(π_ref ‖ π) over the vocabulary, nats, no gradient; comes with ``kl``.
    """

    logps: Tensor
    reference_logps: Tensor | None
    outward: Tensor | None
    inward: Tensor | None
    kl: Tensor | None
    entropy: Tensor | None
    forward_kl: Tensor | None


def token_scores(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    reference_hidden: Tensor | None = None,
    epsilon: float | None = None,
    kl: bool = False,
    entropy: bool = False,
    chunk: int | None = None,
) -> TokenScores:
    """Score tokens from the hidden states that predict them.

    The logits are formed and combined in float32 (float64 for a float64 head). The mixtures are formed as
    f ± ε (f - f_ref), so two equal models give bit-equal log-probs for every ε.

    Args:
        hidden: The policy's last hidden states, (T, H); gradient flows to these.
        targets: The token ids predicted, int64 (T,).
        head: The vocabulary head that both models share.
        reference_hidden: The reference's last hidden states, (T, H); None leaves out all that compares.
        epsilon: Perturbation ε of the mixtures, >= 0; None leaves them out.
        kl: Whether to compute the full-vocabulary KL, both ways; needs the reference.
        entropy: Whether to compute the policy's entropy.
        chunk: Tokens whose logits are held at once; by default as many as ``CHUNK_ELEMENTS`` allows.

    Returns:
        The scores; ``logps``, ``kl`` and ``entropy`` carry gradient to ``hidden``, nothing else does.
    """
    asked = Asked(epsilon, kl, entropy, slopes=hidden.requires_grad and torch.is_grad_enabled())
    together = asked if reference_hidden is not None else Asked(entropy=entropy, slopes=asked.slopes)
    size = chunk or max(1, CHUNK_ELEMENTS // (chunk_tensors(together) * len(head.weight)))
    options = _Options(head, targets, asked, size)
    return TokenScores(*_TokenScores.apply(hidden, reference_hidden, options))


@dataclass(frozen=True)
class _Options:
    head: Head
    targets: Tensor
    asked: Asked
    chunk: int


def chunk_tensors(asked: Asked) -> int:
    """Tensors as large as a chunk's logits that live together: both models' where something compares them."""
    return 1 + (asked.kl or asked.epsilon is not None) + (asked.entropy and asked.slopes)


def logits(hidden: Tensor, head: Head) -> Tensor:
    """Final logits of a few positions.

    Args:
        hidden: Hidden states, (T, H).
        head: The vocabulary head.

    Returns:
        Logits after scale, soft cap and temperature, float32 (float64 for a float64 head), (T, V).
    """
    out = _raw(hidden, head)
    if head.softcap is not None:
        out = out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out if head.temperature == 1.0 else out.div_(head.temperature)


def exact_head(head: Head, hidden: Tensor) -> Head:
    """The head that ``logits`` applies to hidden states like these: off the GPU, a 16-bit one in float32.

    It is converted here once, not at every call of ``logits``.
    """
    if hidden.is_cuda or head.weight.dtype in (torch.float32, torch.float64):
        return head
    return replace(head, weight=head.weight.float())


def _raw(hidden: Tensor, head: Head) -> Tensor:
    weight, bias = head.weight, head.bias
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with _without_autocast(hidden.device.type):
        if weight.dtype != exact and hidden.is_cuda:
            out = torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=exact)
            out = out if bias is None else out.add_(bias)
        else:
            out = F.linear(hidden.to(exact), weight.to(exact), None if bias is None else bias.to(exact))
    return out if head.scale == 1.0 else out.mul_(head.scale)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class _TokenScores(torch.autograd.Function):
    """The sweep over chunks; its backward only scales slopes that the forward has worked out.

    How a score of a token moves with its hidden state, d score / d h, is a vector of H numbers whatever the loss makes
    of the score. It is formed while the chunk's logits are at hand, and takes the place of the hidden state in memory.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, reference: Tensor | None, options: _Options) -> tuple[Tensor | None, ...]:
        exact = replace(options, head=exact_head(options.head, hidden))
        others = [None] * len(hidden.split(exact.chunk)) if reference is None else reference.split(exact.chunk)
        parts = zip(hidden.split(exact.chunk), others, options.targets.split(exact.chunk), strict=True)
        scores, slopes = zip(*(_chunk(h, r, y, exact) for h, r, y in parts), strict=True)
        columns, vectors = _joined(scores), _joined(slopes)
        ctx.save_for_backward(*vectors)
        ctx.mark_non_differentiable(*(columns[i] for i in (1, 2, 3, 6) if columns[i] is not None))
        ctx.set_materialize_grads(False)
        return tuple(columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip((grads[0], grads[4], grads[5]), ctx.saved_tensors, strict=True)
        parts = [slope * grad[:, None].to(slope.dtype) for grad, slope in pairs if grad is not None]
        return (functools.reduce(Tensor.add_, parts) if parts else None), None, None


def _joined(parts: tuple[tuple[Tensor | None, ...], ...]) -> list[Tensor | None]:
    return [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]


def _chunk(h: Tensor, r: Tensor | None, targets: Tensor, options: _Options) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The scores of a chunk, seven of (t,), and the slopes of logps, kl and entropy, (t, H) each; None as asked."""
    asked, head = options.asked, options.head
    reference = reference_logps = None
    if r is not None:
        reference = logits(r, head)
        if not asked.kl and asked.epsilon is None:  # then the two models' logits need not live together
            reference_logps = torch.cat([pick(f, y) for f, y in _blocks(reference, targets)])
            reference = None
    policy = logits(h, head)
    entropy = torch.empty_like(policy) if asked.entropy and asked.slopes else None
    blocks = _blocks(policy, targets, reference, entropy)
    parts = [score_rows(f, y, other, room, _bend(f, options), asked) for f, y, other, room in blocks]
    logps, *others = _joined(tuple(parts))
    scores = (logps, others[0] if reference_logps is None else reference_logps, *others[1:])
    if not asked.slopes:
        return scores, (None, None, None)
    slopes = (policy, reference if asked.kl else None, entropy)
    return scores, tuple(None if part is None else _to_hidden(part, h, head) for part in slopes)


def _blocks(scores: Tensor, targets: Tensor, *others: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """A few rows at a time, so that what is made of them stays in a CPU's cache; all at once on a GPU."""
    size = len(scores) if scores.is_cuda else max(1, BLOCK_ELEMENTS // scores.shape[1])
    many = -(-len(scores) // size)
    rest = ([None] * many if other is None else other.split(size) for other in others)
    return zip(scores.split(size), targets.split(size), *rest, strict=True)


def _bend(final: Tensor, options: _Options) -> Tensor | None:
    """The soft cap's slope at each of the logits, or None where there is nothing to bend."""
    head = options.head
    if head.softcap is None or not options.asked.slopes:
        return None
    return 1 - (final * (head.temperature / head.softcap)) ** 2


def _to_hidden(slope: Tensor, h: Tensor, head: Head) -> Tensor:
    """From the logits before the soft cap back to the hidden states, (t, H)."""
    factor = head.scale / head.temperature
    with _without_autocast(h.device.type):
        out = slope.to(head.weight.dtype) @ head.weight
    return (out if factor == 1.0 else out * factor).to(h.dtype)
