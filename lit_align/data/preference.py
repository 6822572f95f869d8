"""Preference data for Lightning: pairs, or the best and the worst of scored completions."""

from __future__ import annotations

from lit_align.data.completions import CompletionData
from lit_align.data.formats import PREFERENCES, Example
from lit_align.data.pairs import as_pair
from lit_align.data.report import SplitReport


class PreferenceData(CompletionData):
    """Pairs of completions, the better first.

    Of scored completions these are the best and the worst. For the arguments see ``CompletionData``.
    """

    formats = PREFERENCES

    def choose(self, example: Example, report: SplitReport) -> Example | None:
        """The pair, or the best and the worst completion."""
        return as_pair(example, report)
