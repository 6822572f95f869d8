"""The model and data that come with the package."""

from __future__ import annotations

from pathlib import Path

STORIES = "stories"


def resolve(name: str) -> str:
    """The packaged folder for "stories", any other name as it is.

    Args:
        name: A model or dataset as the user wrote it.

    Returns:
        A path or name that can be loaded.
    """
    return str(Path(__file__).parent / STORIES) if name == STORIES else name
