"""What ships inside the package: a small language model of children's stories and preference data for it."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent
_NAMES = ("stories",)


def resolve(name: str) -> str:
    """The folder of an embedded model or dataset, or the name unchanged.

    Args:
        name: ``"stories"``, or anything else: a local directory, or a name on the Hugging Face Hub.

    Returns:
        The absolute path of the packaged folder for ``"stories"``, otherwise ``name``. A local directory called
        ``stories`` is meant by ``./stories``.
    """
    return str(_FOLDER / name) if name in _NAMES else name
