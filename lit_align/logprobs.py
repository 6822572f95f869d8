"""Log-probabilities, mixtures, token KL and entropy of completion tokens, without a (tokens, vocabulary) tensor.

The vocabulary head runs on a few positions at a time. Forward keeps only one number per token; backward computes each
chunk's logits again and multiplies straight back to the hidden states. Both models' hidden states are at hand in the
same sweep, so what compares their distributions costs one pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 2**24
"""Logits of one model formed at once: 64 MiB in float32, whatever the vocabulary; two to five such tensors
live together."""


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
    size = chunk or max(1, CHUNK_ELEMENTS // head.weight.shape[0])
    options = _Options(head, targets, epsilon, kl, entropy, size)
    return TokenScores(*_TokenScores.apply(hidden, reference_hidden, options))


@dataclass(frozen=True)
class _Options:
    head: Head
    targets: Tensor
    epsilon: float | None
    kl: bool
    entropy: bool
    chunk: int


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
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype != exact and hidden.is_cuda:
            out = torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=exact)
            out = out if bias is None else out.add_(bias)
        else:
            out = F.linear(hidden.to(exact), weight.to(exact), None if bias is None else bias.to(exact))
    return out if head.scale == 1.0 else out.mul_(head.scale)


def _pick(scores: Tensor, targets: Tensor) -> Tensor:
    """Log-softmax of each row at its target, (T,)."""
    return scores.gather(1, targets[:, None])[:, 0] - scores.logsumexp(-1)


class _TokenScores(torch.autograd.Function):
    """The sweep over chunks, and its backward that computes each chunk again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, reference: Tensor | None, options: _Options) -> tuple[Tensor | None, ...]:
        exact = replace(options, head=exact_head(options.head, hidden))
        chunks = [
            _forward_chunk(h, r, y, exact) for h, r, y in _chunks(hidden, reference, options.targets, options.chunk)
        ]
        columns = [None if column[0] is None else torch.cat(column) for column in zip(*chunks, strict=True)]
        ctx.save_for_backward(hidden, reference if options.kl else None)
        ctx.options = options
        ctx.mark_non_differentiable(*(columns[i] for i in (1, 2, 3, 6) if columns[i] is not None))
        ctx.set_materialize_grads(False)
        return tuple(columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, reference = ctx.saved_tensors
        options: _Options = replace(ctx.options, head=exact_head(ctx.options.head, hidden))
        wanted = [None if grad is None else grad.split(options.chunk) for grad in (grads[0], grads[4], grads[5])]
        out = torch.empty_like(hidden)
        start = 0
        for index, (h, r, y) in enumerate(_chunks(hidden, reference, options.targets, options.chunk)):
            own = [None if grad is None else grad[index][:, None] for grad in wanted]
            out[start : start + len(h)] = _backward_chunk(h, r, y, options.head, *own)
            start += len(h)
        return out, None, None


def _chunks(hidden: Tensor, reference: Tensor | None, targets: Tensor, size: int) -> Any:
    others = [None] * len(hidden.split(size)) if reference is None else reference.split(size)
    return zip(hidden.split(size), others, targets.split(size), strict=True)


def _forward_chunk(h: Tensor, r: Tensor | None, targets: Tensor, options: _Options) -> tuple[Tensor | None, ...]:
    policy = logits(h, options.head)
    logps = _pick(policy, targets)
    reference_logps = outward = inward = kl = entropy = forward_kl = None
    if r is not None:
        reference = logits(r, options.head)
        reference_logps = _pick(reference, targets)
        if options.kl:
            log_p = policy.log_softmax(-1)
            log_q = reference.log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            forward_kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        if options.epsilon is not None:
            step = torch.sub(policy, reference, out=reference).mul_(options.epsilon)
            outward = _pick(policy + step, targets)
            inward = _pick(policy - step, targets)
    if options.entropy:
        log_p = policy.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
    return logps, reference_logps, outward, inward, kl, entropy, forward_kl


def _backward_chunk(
    h: Tensor,
    r: Tensor | None,
    targets: Tensor,
    head: Head,
    grad_logps: Tensor | None,
    grad_kl: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient with respect to a chunk's hidden states; each incoming gradient is (T, 1) or None.

    With p = softmax(f): d log p_y / df = 1_y - p;  d KL / df = p (log p - log q - KL);  d H / df = -p (log p + H).
    """
    final = logits(h, head)
    grad = final.softmax(-1)
    if grad_kl is None and grad_entropy is None:
        grad *= 0 if grad_logps is None else -grad_logps
    else:
        grad = _distribution_gradient(grad, final, r, head, grad_logps, grad_kl, grad_entropy)
    if grad_logps is not None:
        grad.scatter_add_(1, targets[:, None], grad_logps.to(grad.dtype))
    if head.softcap is not None:
        grad *= 1 - (final * (head.temperature / head.softcap)) ** 2
    grad *= head.scale / head.temperature
    weight = head.weight
    with torch.autocast(h.device.type, enabled=False):
        return (grad.to(weight.dtype) @ weight).to(h.dtype)


def _distribution_gradient(
    p: Tensor,
    final: Tensor,
    r: Tensor | None,
    head: Head,
    grad_logps: Tensor | None,
    grad_kl: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    log_p = final.log_softmax(-1)
    factor = torch.zeros_like(p) if grad_logps is None else -grad_logps.expand_as(p).to(p.dtype)
    if grad_kl is not None and r is not None:
        gap = log_p - logits(r, head).log_softmax(-1)
        factor = factor + grad_kl * (gap - (p * gap).sum(-1, keepdim=True))
    if grad_entropy is not None:
        factor = factor - grad_entropy * (log_p - (p * log_p).sum(-1, keepdim=True))
    return p * factor
