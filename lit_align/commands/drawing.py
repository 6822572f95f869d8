"""Many completions of each prompt, drawn in parts that fit into memory, with a line of progress every now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_align.batch import CompletionBatch
from lit_align.callbacks.draws import Draw, draw
from lit_align.commands.arguments import Drawing
from lit_align.commands.runs import Loaded
from lit_align.data.judge import RewardFunction, judge
from lit_align.data.rows import DataError

log = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 16
TOKENS_AT_ONCE = 2048
"""Tokens of one prompt's completions that are scored together: attention holds a square of them."""
APART = 1_000_003
"""Between the seeds of two parts of the columns; within one a completion is a function of its prompt and column."""
EVERY = 10.0
"""Seconds between two lines of progress."""


def draw_many(
    loaded: Loaded,
    prompts: CompletionBatch,
    completions: int,
    drawing: Drawing,
    *,
    reference: bool,
    reward: RewardFunction | None = None,
) -> Draw:
    """Draw, score and judge completions of each prompt.

    Args:
        loaded: The policy and its reference.
        prompts: N prompts.
        completions: Completions of each, >= 1.
        drawing: How they are drawn.
        reference: Draw from the reference instead of the policy.
        reward: What judges them, or None.

    Returns:
        The draws; a prompt some of whose completions the reward failed on has NaN for all of those of that part.
    """
    parts = list(_parts(len(prompts.prompt_ids), completions, drawing.max_new_tokens))
    begin = shown = time.monotonic()
    rows: dict[int, list[Draw]] = {}
    for done, (start, columns, number) in enumerate(parts):
        some = prompts.rows(slice(start, start + PROMPTS_AT_ONCE)).to(loaded.device)
        with torch.no_grad():
            drawn = draw(loaded, some, columns, drawing.sampling(APART * number), reference)
        drawn.reward = None if reward is None else rewards_of(reward, drawn, loaded.tokenizer)
        rows.setdefault(start, []).append(drawn)
        if (now := time.monotonic()) - shown > EVERY and done + 1 < len(parts):
            shown, left = now, (now - begin) / (done + 1) * (len(parts) - done - 1)
            print(
                f"{'reference' if reference else 'policy'}: {(done + 1) / len(parts):.0%} drawn, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
    return below([beside(draws) for draws in rows.values()])


def rewards_of(reward: RewardFunction, drawn: Draw, tokenizer: Any) -> Tensor:
    """The reward of each completion, float64 (N, K), NaN for prompts on which it failed."""
    try:
        return judge(reward, drawn.groups, tokenizer).double()
    except DataError as error:  # it failed on all prompts of this part, which may be few
        log.warning("%s", error)
        return torch.full(drawn.tokens.shape, torch.nan, dtype=torch.float64)


def _parts(prompts: int, completions: int, tokens: int) -> Iterator[tuple[int, int, int]]:
    """First prompt and number of columns of each part, and which part of the columns it is."""
    most = max(1, TOKENS_AT_ONCE // tokens)
    widths = [min(most, completions - column) for column in range(0, completions, most)]
    for start in range(0, prompts, PROMPTS_AT_ONCE):
        yield from ((start, width, number) for number, width in enumerate(widths))


def beside(draws: Sequence[Draw]) -> Draw:
    """Draws of the same prompts as one of more columns."""
    texts = [[text for some in row for text in some] for row in zip(*(one.completions for one in draws), strict=True)]
    return _joined(draws, draws[0].prompts, texts, 1)


def below(draws: Sequence[Draw]) -> Draw:
    """Draws of different prompts as one."""
    prompts = [prompt for one in draws for prompt in one.prompts]
    return _joined(draws, prompts, [texts for one in draws for texts in one.completions], 0)


def _joined(draws: Sequence[Draw], prompts: list[str], completions: list[list[str]], dim: int) -> Draw:
    kls = [one.kl for one in draws if one.kl is not None]
    rewards = [one.reward for one in draws if one.reward is not None]
    return Draw(
        step=draws[0].step,
        prompts=prompts,
        completions=completions,
        tokens=torch.cat([one.tokens for one in draws], dim),
        ended=torch.cat([one.ended for one in draws], dim),
        groups=_joined_ids([one.groups for one in draws], dim),
        kl=torch.cat(kls, dim) if kls else None,
        reward=torch.cat(rewards, dim) if rewards else None,
    )


def _joined_ids(parts: Sequence[CompletionBatch], dim: int) -> CompletionBatch:
    """Groups of different prompts (0) or columns (1) as one batch, padded to the longest completion."""
    length = max(part.completion_ids.shape[-1] for part in parts)
    ids, masks = ([getattr(part, name) for part in parts] for name in ("completion_ids", "completion_mask"))
    padded = [[nn.functional.pad(one, (0, length - one.shape[-1])) for one in kind] for kind in (ids, masks)]
    joined = parts[0]._replace(
        completion_ids=torch.cat(padded[0], dim),
        completion_mask=torch.cat(padded[1], dim),
        present=torch.cat([part.present for part in parts], dim),
    )
    if dim == 1:
        return joined
    return joined._replace(
        prompt_ids=torch.cat([part.prompt_ids for part in parts]),
        prompt_mask=torch.cat([part.prompt_mask for part in parts]),
        row=torch.cat([part.row for part in parts]),
    )
