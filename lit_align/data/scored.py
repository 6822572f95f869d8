"""Groups of scored completions for Lightning, best first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lit_align.data.arguments import at_least
from lit_align.data.collate import Group
from lit_align.data.completions import CompletionData
from lit_align.data.formats import IMPLICIT_PAIR, PAIR, SCORED, Example
from lit_align.data.report import SplitReport
from lit_align.data.select import all_pairs, best, best_and_worst, ranked

Select = Literal["ranked", "best_and_worst", "best", "all_pairs"]


class ScoredGroups(CompletionData):
    """All completions of each prompt with their rewards, best first; equal rewards keep their order.

    A pair of chosen and rejected is a group of two with the rewards 1 and 0. A row whose rewards are all equal is
    dropped. The arguments that are not listed are those of ``CompletionData``.

    Args:
        dataset: "stories" for the packaged one; a local .jsonl, .json or .parquet file, or a folder of such; or a Hub
            name, ``name`` or ``name:config``.
        select: Completions of a row to take: "ranked" all; "best_and_worst" two; "best" one; "all_pairs" makes each
            better and worse one a group of two, so that a row gives up to K(K - 1) / 2 groups.
        max_completions: Take only this many completions of a row, the first as given, >= 2; None takes all.

    Raises:
        DataError: If an argument is out of its range.
    """

    formats = (SCORED, PAIR, IMPLICIT_PAIR)

    def __init__(
        self,
        dataset: str = "stories",
        select: Select = "ranked",
        max_completions: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        at_least("max_completions", max_completions, 2, "leave it out to take all")
        self.select, self.max_completions = select, max_completions

    def choose(self, example: Example, report: SplitReport) -> Example | None:
        """The selected completions, best first."""
        rewards = ([1.0, 0.0] if example.rewards is None else example.rewards)[: self.max_completions]
        if all(reward == rewards[0] for reward in rewards):
            report.drop("all rewards equal", example.place)
            return None
        positions = self._positions(rewards)
        completions = [example.completions[number] for number in positions]
        if len(completions) > 1 and all(text == completions[0] for text in completions):
            report.drop("identical pair" if len(completions) == 2 else "identical completions", example.place)
            return None
        if len(set(rewards)) < len(rewards):
            report.note("some rewards equal, order kept", example.place)
        return example._replace(completions=completions, rewards=[rewards[number] for number in positions])

    def _positions(self, rewards: Sequence[float]) -> Sequence[int]:
        """The completions to tokenize, best first."""
        if self.select == "best":
            return [best(rewards)]
        if self.select == "best_and_worst":
            return best_and_worst(rewards) or ()
        return ranked(rewards)

    def split(self, group: Group, report: SplitReport) -> list[Group]:
        """The group, or with "all_pairs" each of its pairs that is not the same after tokenization and cutting."""
        if self.select != "all_pairs" or group.rewards is None:
            return [group]
        pairs = [
            group._replace(
                completion_ids=[group.completion_ids[number] for number in pair],
                rewards=[group.rewards[number] for number in pair],
            )
            for pair in all_pairs(group.rewards)
        ]
        kept = [pair for pair in pairs if not pair.completion_ids[0].equal(pair.completion_ids[1])]
        if len(kept) < len(pairs):
            report.note("identical pair left out of a row", f"row {group.row}")
        return kept
