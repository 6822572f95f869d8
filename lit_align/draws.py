"""Fresh completions beside the policy that drew them, and their rewards beside all others."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Rollout, Sampling
from lit_align.snapshot import snapshot

if TYPE_CHECKING:
    from lit_align.pair import PolicyReferencePair

log = logging.getLogger(__name__)


def draw(pair: PolicyReferencePair, prompts: CompletionBatch, completions: int, sampling: Sampling) -> Rollout:
    """Draw completions with log π_θ of their tokens.

    Args:
        pair: Policy and reference.
        prompts: Prompts on the pair's device.
        completions: Completions of each, >= 1.
        sampling: How.

    Returns:
        The rollout; ``old_logps`` are those of the draw, or the scorer's where the draw is truncated or at another
        temperature than the policy's.
    """
    rollout = pair.generate(prompts, completions, sampling)
    own = pair.settings.temperature
    if sampling.top_k or sampling.top_p < 1 or (sampling.temperature or own) != own:
        log.info("draws are truncated or at another temperature: log-probs of the policy come from the scorer")
        scores = snapshot(functools.partial(pair.score, reference=False), rollout.completions)
        rollout = rollout._replace(old_logps=scores.token_logps)
    return rollout


def reward_pool(batch: CompletionBatch, trainer: Any) -> Tensor:
    """All rewards that a reward is to be compared with, over all ranks.

    Args:
        batch: The fresh buffer of this rank, or a micro-batch of a dataset.
        trainer: The trainer that runs, or None.

    Returns:
        The rewards of the buffers of all ranks; for a dataset those of all its training completions, float32 (N,).
    """
    assert batch.reward is not None
    data = getattr(trainer, "datamodule", None)
    pool: Tensor | None = getattr(data, "training_rewards", None)
    if pool is not None:
        return pool.to(batch.reward.device)
    marked = batch.reward.masked_fill(~batch.present, torch.nan)
    if trainer is not None and trainer.world_size > 1:
        # Fresh buffers wait on the CPU, and what gathers for GPUs takes nothing from there.
        marked = trainer.strategy.all_gather(marked.to(trainer.strategy.root_device)).to(marked.device)
    return marked[~marked.isnan()]
