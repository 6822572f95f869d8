"""Demonstrations for Lightning: completions to imitate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_align.data.collate import Group
from lit_align.data.completions import CompletionData
from lit_align.data.formats import (
    CONVERSATION,
    DEMONSTRATION,
    IMPLICIT_PAIR,
    LABELLED,
    PAIR,
    SCORED,
    Example,
    Format,
)
from lit_align.data.pairs import as_pair
from lit_align.data.report import Roles, SplitReport
from lit_align.data.rows import DataError
from lit_align.data.select import at_least, best


class Demonstrations(CompletionData):
    """Completions to imitate, without rewards: one of a prompt, or all the good ones.

    Of labelled completions these are the good ones, of a pair the chosen one (of the pairs that ``PreferenceData``
    keeps), of scored completions the best one, or all that reach a threshold. The arguments that are not listed are
    those of ``CompletionData``.

    Args:
        dataset: "stories" for the packaged one; a local .jsonl, .json or .parquet file, or a folder of such; or a Hub
            name, ``name`` or ``name:config``.
        threshold: Take every scored completion with at least this reward; None takes the best one.
    """

    comparing = False

    def __init__(self, dataset: str = "stories", threshold: float | None = None, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.threshold = threshold

    @property
    def formats(self) -> Sequence[Format]:
        """Scored completions come first with a threshold, which is of no use without rewards, and last otherwise."""
        others = (LABELLED, DEMONSTRATION, CONVERSATION, PAIR, IMPLICIT_PAIR)
        return (*others, SCORED) if self.threshold is None else (SCORED, *others)

    def choose(self, example: Example, report: SplitReport) -> Example | None:
        """The completions to imitate, each text once.

        Raises:
            DataError: If there is a threshold and no rewards.
        """
        if self.threshold is not None and (example.labelled or example.rewards is None):
            raise DataError(
                f"data.threshold={self.threshold:g} needs scored completions, and {example.place} has none; give rows "
                "with completions and rewards, or leave threshold out"
            )
        if example.labelled:
            return self._good(example, report)
        if example.rewards is not None:
            return self._scored(example, example.rewards, report)
        chosen = as_pair(example, report) if len(example.completions) == 2 else example
        return None if chosen is None else chosen._replace(completions=chosen.completions[:1])

    def roles(self, groups: Sequence[Group]) -> Roles:
        """All play the same."""
        return {"completion": [ids for group in groups for ids in group.completion_ids]}

    def _good(self, example: Example, report: SplitReport) -> Example | None:
        if example.rewards == [1.0]:
            return example._replace(rewards=None)
        report.leave_out("labelled bad", example.place)
        return None

    def _scored(self, example: Example, rewards: list[float], report: SplitReport) -> Example | None:
        if self.threshold is None:
            positions = [best(rewards)]
            if rewards.count(max(rewards)) > 1:
                report.note("several best completions, the first taken", example.place)
        else:
            positions = at_least(rewards, self.threshold)
        if not positions:
            report.leave_out(f"no reward reaches {self.threshold:g}", example.place)
            return None
        texts = [example.completions[number] for number in positions]
        distinct = [text for number, text in enumerate(texts) if text not in texts[:number]]
        if len(distinct) < len(texts):
            report.note("repeated completion left out of a group", example.place)
        return example._replace(completions=distinct, rewards=None)
