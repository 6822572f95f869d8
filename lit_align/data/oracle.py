"""The reward that scored a packaged dataset."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from lit_align.protocols import Reward


def load_oracle(folder: Path) -> Reward:
    """Build the reward that a dataset names in its ``about.json``; this runs the code named there.

    Args:
        folder: Of a dataset that is part of this package.
    """
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    module, _, name = str(about["oracle"]).rpartition(".")
    oracle: Reward = getattr(importlib.import_module(module), name)()
    return oracle
