"""What parts ask of each other without importing each other: a reward of anyone, a module of a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lit_align.batch import CompletionBatch, Rollout, Sampling


@runtime_checkable
class Reward(Protocol):
    """Anything that judges completions: larger is better."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        """One reward for each (prompt, completion) of two sequences of equal length."""
        ...


@runtime_checkable
class TokenReward(Protocol):
    """A reward that can read token ids, so that nothing is decoded and encoded again."""

    def on_tokens(self, batch: CompletionBatch, tokenizer: Any) -> Tensor | None:
        """The reward of each completion, float (B, K), or None where it cannot read this tokenizer's ids."""
        ...


class Learner(Protocol):
    """What a buffer of fresh completions needs of the module that learns from it."""

    def generate(self, prompts: CompletionBatch, completions: int, sampling: Sampling) -> Rollout:
        """Draw ``completions`` completions of each prompt from the policy as it is."""
        ...

    def annotate(self, rollout: Rollout) -> Rollout:
        """Fix what depends on the whole of a fresh buffer."""
        ...

    def observe(self, rollout: Rollout, seconds: float) -> None:
        """Measure a fresh buffer that took some seconds to draw and to judge."""
        ...
