"""The chunked sweep against plain full-vocabulary torch, and its backward against autograd and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_align.logprobs import Head, token_scores

T, H, V = 11, 6, 17
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.3, "temperature": 0.8},
    "capped": {"softcap": 2.0, "scale": 1.5, "temperature": 1.3, "bias": True},
}


def inputs(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Head]:
    generator = torch.Generator().manual_seed(0)
    options = dict(HEADS[kind])
    hidden, reference = (torch.randn(T, H, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype) if options.pop("bias", False) else None
    targets = torch.randint(0, V, (T,), generator=generator)
    return hidden.requires_grad_(), reference, targets, Head(weight=weight, bias=bias, **options)


def full_logits(hidden: Tensor, head: Head) -> Tensor:
    raw = hidden @ head.weight.T
    raw = (raw if head.bias is None else raw + head.bias) * head.scale
    return (raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)) / head.temperature


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 4, 11, 50])
def test_every_score_equals_the_full_computation(kind: str, chunk: int) -> None:
    hidden, reference, targets, head = inputs(kind)
    found = token_scores(
        hidden, targets, head, reference_hidden=reference, epsilon=0.2, kl=True, entropy=True, chunk=chunk
    )
    f, r = full_logits(hidden, head), full_logits(reference, head)
    log_p, log_q = f.log_softmax(-1), r.log_softmax(-1)
    at = torch.arange(T), targets
    expected = {
        "logps": log_p[at],
        "reference_logps": log_q[at],
        "outward": (1.2 * f - 0.2 * r).log_softmax(-1)[at],
        "inward": (0.8 * f + 0.2 * r).log_softmax(-1)[at],
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "forward_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, msg=name)
    weights = torch.randn(3, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = ("logps", "kl", "entropy")
    ours = torch.autograd.grad(sum((getattr(found, n) * w).sum() for n, w in zip(parts, weights, strict=True)), hidden)
    theirs = torch.autograd.grad(sum((expected[n] * w).sum() for n, w in zip(parts, weights, strict=True)), hidden)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("part", ["logps", "kl", "entropy"])
def test_the_backward_agrees_with_finite_differences(kind: str, part: str) -> None:
    hidden, reference, targets, head = inputs(kind)

    def scored(states: Tensor) -> Tensor:
        found = token_scores(states, targets, head, reference_hidden=reference, kl=True, entropy=True, chunk=4)
        return getattr(found, part)

    assert torch.autograd.gradcheck(scored, (hidden,))


def test_what_carries_no_gradient_says_so() -> None:
    hidden, reference, targets, head = inputs("plain")
    found = token_scores(hidden, targets, head, reference_hidden=reference, epsilon=0.1)
    assert found.logps.requires_grad
    for part in (found.reference_logps, found.outward, found.inward):
        assert part is not None
        assert not part.requires_grad
    assert found.kl is None
    assert found.entropy is None


def test_equal_models_give_bit_equal_scores_for_any_perturbation() -> None:
    hidden, _, targets, head = inputs("capped", torch.float32)
    found = token_scores(hidden, targets, head, reference_hidden=hidden.detach(), epsilon=0.37, kl=True, chunk=3)
    for part in (found.reference_logps, found.outward, found.inward):
        assert part is not None
        assert torch.equal(part, found.logps)
    assert found.kl is not None
    assert found.kl.abs().max() == 0


@pytest.mark.parametrize("distance", [1.0, 30.0, 1000.0])
def test_models_far_apart_are_mixed_as_exactly_as_near_ones(distance: float) -> None:
    hidden, reference, targets, head = inputs("plain", torch.float32)
    exact = [states.detach().double() @ head.weight.double().T for states in (hidden, reference * distance)]
    found = token_scores(hidden, targets, head, reference_hidden=reference * distance, epsilon=0.5)
    for sign, part in ((1, found.outward), (-1, found.inward)):
        mixed = exact[0] + sign * 0.5 * (exact[0] - exact[1])
        expected = mixed.log_softmax(-1)[torch.arange(T), targets]
        assert part is not None
        torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_bfloat16_head_is_combined_in_float32() -> None:
    """Perturbations far below bfloat16's resolution of the logits must still move the log-probs."""
    hidden, reference, targets, head = inputs("plain", torch.bfloat16)
    found = token_scores(hidden, targets, head, reference_hidden=reference, epsilon=1e-3)
    f, r = hidden.float() @ head.weight.float().T, reference.float() @ head.weight.float().T
    expected = (f + 1e-3 * (f - r)).log_softmax(-1)[torch.arange(T), targets]
    assert found.outward is not None
    assert found.outward.dtype == torch.float32
    torch.testing.assert_close(found.outward, expected)
    assert (found.outward != found.logps).all()


def test_no_tensor_of_tokens_by_vocabulary_is_kept() -> None:
    """With a chunk of 2 of 11 tokens, forward saves only what is T × H."""
    hidden, reference, targets, head = inputs("plain")
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
        token_scores(hidden, targets, head, reference_hidden=reference, kl=True, chunk=2)
    assert set(saved) == {torch.Size((T, H))}
