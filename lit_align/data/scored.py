"""Groups of scored completions for Lightning, best first."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lit_align.data.arguments import at_least
from lit_align.data.collate import Group, collate
from lit_align.data.completions import CompletionData
from lit_align.data.formats import IMPLICIT_PAIR, PAIR, SCORED, Example
from lit_align.data.judge import RewardFunction, judge
from lit_align.data.report import SplitReport
from lit_align.data.rows import DataError
from lit_align.data.select import Select, all_pairs, best, best_and_worst, ranked
from lit_align.data.shorten import Shorten, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

JUDGED_AT_ONCE = 64
"""Rows a reward is given together."""


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
        reward: Judge all completions anew by this, as ``OnPolicyData`` does fresh ones, in place of their own rewards.
        shorten: Make completions end early before they are judged; needs ``reward``.

    Raises:
        DataError: If an argument is out of its range.
    """

    formats = (SCORED, PAIR, IMPLICIT_PAIR)

    def __init__(
        self,
        dataset: str = "stories",
        select: Select = "ranked",
        max_completions: int | None = None,
        reward: RewardFunction | None = None,
        shorten: Shorten | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        at_least("max_completions", max_completions, 2, "leave it out to take all")
        if shorten is not None and reward is None:
            raise DataError("data.shorten changes completions, so their rewards are no longer theirs: set data.reward")
        self.select, self.max_completions = select, max_completions
        self.reward, self.shorten = reward, shorten

    @property
    def oracle(self) -> RewardFunction | None:
        """The reward the completions were judged by."""
        return super().oracle if self.reward is None else self.reward

    def choose(self, example: Example, report: SplitReport) -> Example | None:
        """The selected completions, best first; all of them where they are still to be judged."""
        if self.reward is not None:
            return example._replace(completions=example.completions[: self.max_completions], rewards=None)
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

    def label(self, groups: list[Group], tokenizer: PreTrainedTokenizerBase, report: SplitReport) -> list[Group]:
        """The groups; where a reward is set, judged by it and the completions selected by that."""
        if self.reward is None or not groups:
            return groups
        if self.shorten is not None:
            groups = shortened(groups, self.shorten, self.seed, int(tokenizer.eos_token_id))
        judged: list[Group] = []
        for start in range(0, len(groups), JUDGED_AT_ONCE):
            some = groups[start : start + JUDGED_AT_ONCE]
            found = self._judged(some, tokenizer, first=start == 0)
            for group, row in zip(some, found, strict=True):
                rewards = row[: len(group.completion_ids)]
                if reason := _useless(rewards):
                    report.drop(reason, f"row {group.row}")
                else:
                    judged.append(taken(group._replace(rewards=rewards), self._positions(rewards)))
        return judged

    def _judged(self, groups: list[Group], tokenizer: PreTrainedTokenizerBase, first: bool) -> list[list[float]]:
        """The rewards of some groups; a reward that fails for all of the first ones is not asked again."""
        assert self.reward is not None
        try:
            return judge(self.reward, collate(groups), tokenizer).tolist()
        except DataError as error:
            if first:
                raise
            log.warning("%s", error)
            return [[math.nan] * len(group.completion_ids) for group in groups]

    def split(self, group: Group, report: SplitReport) -> list[Group]:
        """The group, or with "all_pairs" each of its pairs that is not the same after tokenization and cutting."""
        if self.select != "all_pairs" or group.rewards is None:
            return [group]
        pairs = [taken(group, pair) for pair in all_pairs(group.rewards)]
        kept = [pair for pair in pairs if not pair.completion_ids[0].equal(pair.completion_ids[1])]
        if len(kept) < len(pairs):
            report.note("identical pair left out of a row", f"row {group.row}")
        return kept


def taken(group: Group, positions: Sequence[int]) -> Group:
    """Some completions of a group with their rewards, in this order."""
    assert group.rewards is not None
    return group._replace(
        completion_ids=[group.completion_ids[number] for number in positions],
        rewards=[group.rewards[number] for number in positions],
    )


def _useless(rewards: Sequence[float]) -> str | None:
    """Why nothing can be learned from completions with these rewards, or None."""
    if any(math.isnan(reward) for reward in rewards):
        return "the reward failed"
    return "all rewards equal" if all(reward == rewards[0] for reward in rewards) else None
