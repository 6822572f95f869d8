"""What a study says: its tables, claims and figures, from its JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trials.claims import Claim, claims_table

Found = Mapping[str, Any]
"""A study's JSON."""


@dataclass(frozen=True)
class Report:
    """How to tell a study's results.

    Attributes:
        tables: All tables as Markdown.
        claims: What is to be decided, and the arms with the measures that the claims are about.
        figures: Draws all figures that there are runs for into a folder.
        digits: Behind the point, in the claims.
    """

    tables: Callable[[Found], str]
    claims: Callable[[Found], tuple[Sequence[Claim], Mapping[str, Any]]]
    figures: Callable[[Found, Path], None]
    digits: int = 3

    def text(self, found: Found) -> str:
        """Tables, and claims where there are any."""
        claims, arms = self.claims(found)
        decided = [f"Claims\n\n{claims_table(claims, arms, self.digits)}"] if claims else []
        return "\n\n".join([self.tables(found), *decided]) + "\n"
