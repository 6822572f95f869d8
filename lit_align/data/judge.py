"""Judge completions by a reward that may be slow to load, read token ids or text, raise, or give no number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch
from lit_align.data.rows import DataError
from lit_align.errors import UserError
from lit_align.protocols import TokenReward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""Prompts and completions, one prompt for each completion, to one reward for each, larger is better."""


def judge(reward: RewardFunction, batch: CompletionBatch, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The reward of each completion.

    A reward that raises for all completions together is asked group by group, so that one bad group costs no other.

    Args:
        reward: Judges texts; one that is a ``TokenReward`` reads the ids where it can.
        batch: B prompts with K completions each.
        tokenizer: Of the ids.

    Returns:
        Rewards, float32 (B, K); NaN for all completions of a group where the reward raised, or one is not finite.

    Raises:
        DataError: If no group has rewards, with the first error; or if there is not one number for each completion.
        UserError: As the reward raises it.
    """
    found = reward.on_tokens(batch, tokenizer) if isinstance(reward, TokenReward) else None
    errors: list[Exception] = []
    if found is None:
        prompts, completions = texts_of(batch, tokenizer)
        # A column that only makes a group as wide as the others is no completion.
        rows = zip(completions, batch.present.tolist(), strict=True)
        there = [[text for text, present in zip(*row, strict=True) if present] for row in rows]
        values = _ask(reward, prompts, there, errors).float()
        found = torch.zeros(batch.present.shape).masked_scatter(batch.present.cpu(), values)
    found = found.float().cpu()
    sound = (found.isfinite() | ~batch.present.cpu()).all(-1)
    if not sound.any():
        cause = f"the first error: {errors[0]!r}" if errors else "none of its values is a finite number"
        raise DataError(f"the reward {_name(reward)} failed for all of {len(found)} groups of completions; {cause}")
    if not sound.all():
        reason = f"raised {errors[0]!r}" if errors else "gave a value that is no finite number"
        left = int((~sound).sum())
        log.warning("the reward %s %s: %d of %d groups are left out", _name(reward), reason, left, len(found))
    return found.masked_fill(~sound[:, None], torch.nan)


def texts_of(batch: CompletionBatch, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[list[str]]]:
    """The prompts (B) and the completions (B lists of K) as text, without special tokens."""
    asked = [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    flat = zip(batch.completion_ids.flatten(0, 1), batch.completion_mask.flatten(0, 1), strict=True)
    given = [ids[mask].tolist() for ids, mask in flat]
    prompts = tokenizer.batch_decode(asked, skip_special_tokens=True)
    completions = tokenizer.batch_decode(given, skip_special_tokens=True)
    columns = batch.present.shape[1]
    return prompts, [completions[start : start + columns] for start in range(0, len(completions), columns)]


def _ask(
    reward: RewardFunction, prompts: Sequence[str], completions: Sequence[Sequence[str]], errors: list[Exception]
) -> Tensor:
    """Rewards of all completions (N,), at once or else group by group; what was raised goes to ``errors``."""
    flat = [text for texts in completions for text in texts]
    repeated = [prompt for prompt, texts in zip(prompts, completions, strict=True) for _ in texts]
    try:
        return _numbers(reward, repeated, flat)
    except UserError:
        raise
    except Exception as error:
        errors.append(error)
    if len(prompts) == 1:
        return torch.full((len(flat),), torch.nan)
    parts = [_ask(reward, [prompt], [texts], errors) for prompt, texts in zip(prompts, completions, strict=True)]
    return torch.cat(parts)


def _numbers(reward: RewardFunction, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    values = reward(prompts, completions)
    found = torch.as_tensor(values if isinstance(values, Tensor) else list(values), dtype=torch.float64).cpu().flatten()
    if len(found) != len(completions):
        raise DataError(
            f"the reward {_name(reward)} gave {len(found)} values for {len(completions)} completions; it is called "
            "with a list of prompts and a list of completions of the same length and must return one number for each"
        )
    return found


def _name(reward: RewardFunction) -> str:
    return getattr(reward, "__qualname__", type(reward).__qualname__)
