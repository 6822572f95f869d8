"""Rewards by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from lit_align.errors import UserError
from lit_align.protocols import Reward


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
