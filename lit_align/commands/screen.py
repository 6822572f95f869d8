"""Where tables go."""

from __future__ import annotations

import os

import rich
from rich.console import Console

WIDE = 150
"""Columns of a table that no terminal bounds, such as in a file."""


def wide_console() -> Console:
    """The terminal; where there is none, lines long enough for a table, unless COLUMNS says otherwise."""
    console = rich.get_console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)
