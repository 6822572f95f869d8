"""Unpaired data for Lightning: single completions labelled good or bad."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

from lit_align.batch import CompletionBatch
from lit_align.data.collate import Group, collate
from lit_align.data.completions import CompletionData
from lit_align.data.formats import IMPLICIT_PAIR, LABELLED, PAIR, SCORED, Example
from lit_align.data.holdout import prompt_key
from lit_align.data.loader import Collate
from lit_align.data.pairs import as_pair
from lit_align.data.report import Roles, SplitReport


class UnpairedData(CompletionData):
    """Completions labelled good (+1) or bad (-1), each a group of its own, as KTO wants them.

    Of a pair the chosen one is good and the rejected one bad; so are the best and the worst of scored completions.
    A batch has a second column, the completion of the next group with another prompt, see ``collate_unpaired``. For the
    arguments see ``CompletionData``.
    """

    formats = (LABELLED, PAIR, IMPLICIT_PAIR, SCORED)
    mismatched = True

    def choose(self, example: Example, report: SplitReport) -> Example | None:
        """The labelled completion, or a good and a bad one."""
        if example.labelled:
            return example
        pair = as_pair(example, report)
        return None if pair is None else pair._replace(rewards=[1.0, -1.0])

    def split(self, group: Group, report: SplitReport) -> list[Group]:
        """A group for each completion."""
        labels = group.rewards or ()
        return [
            group._replace(completion_ids=[ids], rewards=[label])
            for ids, label in zip(group.completion_ids, labels, strict=True)
        ]

    def roles(self, groups: Sequence[Group]) -> Roles:
        """Good and bad completions."""
        found: Roles = {"good": [], "bad": []}
        for group in groups:
            found["good" if group.rewards == [1.0] else "bad"] += group.completion_ids
        return found

    def collator(self) -> Collate:
        """Adds the second column."""
        return functools.partial(collate_unpaired, max_total=self.limits.max_total, pad_id=self._pad_id)


def collate_unpaired(groups: Sequence[Group], max_total: int, pad_id: int = 0) -> CompletionBatch:
    """Pad labelled completions to a batch, beside each the completion of another prompt.

    The second column is the completion of the next group, in a circle, whose prompt is not the same. It belongs to no
    label: KTO reads it, against the wrong prompt, for its estimate z of the divergence (arXiv 2402.01306), and for
    nothing else. It is cut to what its new prompt leaves of ``max_total``.

    Args:
        groups: B >= 1 groups with one completion each, and its label, +1 or -1, as the reward.
        max_total: Most tokens of a prompt and one completion.
        pad_id: Written where the masks are False.

    Returns:
        K = 2 columns, both present; the reward is the label in column 0, and 0 in column 1. Where all prompts are the
        same, as in a batch of one, K = 1, with a warning the first time.
    """
    others = _mismatched(groups)
    if others is None:
        _warn_of_one_prompt()
        return collate(groups, pad_id)
    pairs = [
        group._replace(
            completion_ids=[group.completion_ids[0], other.completion_ids[0][: max_total - len(group.prompt_ids)]],
            rewards=[*(group.rewards or ()), 0.0],
        )
        for group, other in zip(groups, others, strict=True)
    ]
    return collate(pairs, pad_id)


def _mismatched(groups: Sequence[Group]) -> list[Group] | None:
    """For each group the next one, in a circle, that has another prompt; None where all prompts are the same."""
    keys = [prompt_key(group) for group in groups]
    if len(set(keys)) < 2:
        return None
    circle = [*zip(keys, groups, strict=True)] * 2
    return [next(other for key, other in circle[number + 1 :] if key != keys[number]) for number in range(len(groups))]


@functools.cache  # so once in a process; the filters of warnings forget as soon as any code changes them
def _warn_of_one_prompt() -> None:
    warnings.warn(
        "a micro-batch has only one prompt, so no completion of another prompt to estimate KTO's z from, which is then "
        "0; a larger data.batch_size makes this rare",
        stacklevel=3,
    )
