"""Rewards by name, and what they say of many completions when one of them may fail."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_align.batch import Reward
from lit_align.errors import UserError


def load_reward(name: str) -> Reward:
    """A reward by its place or its name; a name imports and runs the code it stands for.

    Args:
        name: The folder ``adapter`` of a trained reward, or the dotted name of a class to build or of a function
            ``(prompts, completions) -> floats``; modules of the working directory are found as well.

    Raises:
        UserError: If there is neither.
    """
    from lit_align.rewards import TrainedReward

    module, _, attribute = name.rpartition(".")
    if "/" in name or Path(name).exists():
        return TrainedReward(name)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--reward {name}: no such folder, and no such name in Python ({error}); give the folder adapter of a "
            "trained reward, or a name such as lit_align.rewards.Vader"
        ) from error
    reward: Reward = found() if isinstance(found, type) else found
    return reward


def judge(
    reward: Reward, prompts: Sequence[str], completions: Sequence[Sequence[str]]
) -> list[list[float] | Exception]:
    """The rewards of the completions of each prompt; all at once, or one prompt at a time if that cannot be had.

    Args:
        reward: Any reward.
        prompts: N texts.
        completions: For each prompt its texts.

    Returns:
        For each prompt finite rewards, or what went wrong with it.
    """
    asked = [prompt for prompt, texts in zip(prompts, completions, strict=True) for _ in texts]
    try:
        found = [float(value) for value in reward(asked, [text for texts in completions for text in texts])]
        if len(found) != len(asked):
            raise ValueError(f"the reward gave {len(found)} numbers for {len(asked)} completions")
    except Exception as error:  # whatever a user's function raises
        if len(prompts) == 1:
            return [error]
        return [
            one for prompt, texts in zip(prompts, completions, strict=True) for one in judge(reward, [prompt], [texts])
        ]
    values = iter(found)
    split = [[next(values) for _ in texts] for texts in completions]
    return [one if all(map(math.isfinite, one)) else ValueError(f"the rewards are {one}") for one in split]


def reward_table(
    reward: Reward, prompts: Sequence[str], completions: Sequence[Sequence[str]]
) -> tuple[Tensor, list[Exception]]:
    """Rewards of equally many completions of each prompt.

    Returns:
        float64 (N, K), NaN throughout the rows of prompts on which the reward failed, and what went wrong there.
    """
    judged = judge(reward, prompts, completions)
    width = max(map(len, completions))
    rows = [[math.nan] * width if isinstance(one, Exception) else one for one in judged]
    return torch.tensor(rows, dtype=torch.float64), [one for one in judged if isinstance(one, Exception)]
