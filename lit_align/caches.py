"""Where caches lie on disk. What is in them can be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path

PLACE = "LIT_ALIGN_CACHE"
"""Environment variable that names the folder of all caches; ``~/.cache/lit_align`` where it is not set."""


def root(setting: bool | str = True) -> Path:
    """The folder of all caches: the one that is set, else the environment's, else the user's."""
    if isinstance(setting, str):
        return Path(setting).expanduser()
    named = os.environ.get(PLACE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "lit_align"
