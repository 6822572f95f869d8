"""Completions drawn at one moment of training, scored, judged and summed up."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_align.batch import CompletionBatch, Sampling
from lit_align.data.judge import RewardFunction, judge, texts_of
from lit_align.data.rows import DataError

log = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 16
"""Prompts whose completions are scored together."""


@dataclass
class Draw:
    """N completions of each of some prompts at one moment of training.

    Attributes:
        step: Optimizer steps taken.
        prompts: N texts.
        completions: N lists of K texts.
        tokens: Completion tokens, end of sequence included, int64 (N, K).
        ended: Whether a completion ended by itself, bool (N, K).
        groups: The token ids themselves.
        kl: KL(policy ‖ reference) summed over each completion's tokens, nats (N, K); None for the reference's own.
        reward: The oracle's reward, float (N, K), NaN where it failed; None without an oracle.
    """

    step: int
    prompts: list[str]
    completions: list[list[str]]
    tokens: Tensor
    ended: Tensor
    groups: CompletionBatch
    kl: Tensor | None = None
    reward: Tensor | None = None

    def summary(self) -> dict[str, Any]:
        """Means with the standard error over prompts; JSON-ready."""
        result: dict[str, Any] = {"step": self.step, "prompts": len(self.prompts), "completions": self.tokens.shape[1]}
        for name in ("reward", "kl"):
            values = getattr(self, name)
            if values is not None:
                result[name] = mean_and_error(values)
        return result | {"ended": self.ended.double().mean().item(), "tokens": self.tokens.double().mean().item()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One record for each completion."""
        for i, prompt in enumerate(self.prompts):
            for k, completion in enumerate(self.completions[i]):
                row = {"step": self.step, "prompt": prompt, "completion": completion}
                row |= {"tokens": int(self.tokens[i, k]), "ended": bool(self.ended[i, k])}
                values = {name: getattr(self, name) for name in ("reward", "kl")}
                yield row | {name: _number(value[i, k]) for name, value in values.items() if value is not None}


def _number(value: Tensor) -> float | None:
    """JSON has no NaN."""
    return None if value.isnan() else value.item()


def mean_and_error(values: Tensor) -> dict[str, float | None]:
    """Mean over prompts and its standard error, where the completions of one prompt count as one cluster.

    Args:
        values: One value per completion, (N, K); a prompt with a NaN is left out.

    Returns:
        ``mean``, and ``standard_error`` = sd of the N prompt means / sqrt(N); None for a single prompt.
    """
    means = values.double().mean(1)
    means = means[~means.isnan()]
    error = (means.std() / math.sqrt(len(means))).item() if len(means) > 1 else None
    return {"mean": means.mean().item(), "standard_error": error}


@contextmanager
def undisturbed(module: LightningModule) -> Iterator[None]:
    """No gradients, every part in eval mode, torch's random states forked; all as before afterwards."""
    modes = {part: part.training for part in module.modules()}
    devices = [module.device] if module.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            module.eval()
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def draw(module: Any, prompts: CompletionBatch, completions: int, sampling: Sampling, reference: bool) -> Draw:
    """Draw and score completions.

    Args:
        module: An AlignModule whose pair is built.
        prompts: N prompts; their own completions are ignored.
        completions: Completions of each prompt, >= 1.
        sampling: How they are drawn.
        reference: Draw from the reference instead of the policy; its KL to itself is left out.
    """
    drawn = module.pair.generate(prompts, completions, sampling, reference=reference).completions
    tokenizer = module.tokenizer
    asked, given = texts_of(drawn, tokenizer)
    return Draw(
        step=0,
        prompts=asked,
        completions=given,
        tokens=drawn.lengths.cpu(),
        ended=module.pair.ended(drawn).cpu(),
        groups=drawn,
        kl=None if reference else _divergence(module, drawn).cpu(),
    )


def _divergence(module: Any, drawn: CompletionBatch) -> Tensor:
    """KL(policy ‖ reference) summed over the tokens of each completion, (N, K), a few prompts at a time.

    The reference is the one that training began with, so that a run whose reference moves is no nearer for it.
    """
    starts = range(0, len(drawn.row), PROMPTS_AT_ONCE)
    parts = (drawn.rows(slice(start, start + PROMPTS_AT_ONCE)) for start in starts)
    with module.pair.from_the_start():
        return torch.cat([module.pair.score(part, kl=True).token_kl.sum(-1) for part in parts])


def judged(oracle: RewardFunction | None, drawn: Draw, tokenizer: Any) -> Tensor | None:
    """The oracle's reward of each completion, (N, K), NaN where it failed; None without an oracle, or where it fails
    for all, which is said: samples are for the eye, and end no run."""
    if oracle is None:
        return None
    try:
        return judge(oracle, drawn.groups, tokenizer).double()
    except DataError as error:
        log.warning("the samples of step %d have no reward: %s", drawn.step, error)
        return None
