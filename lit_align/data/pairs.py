"""Two completions of a group: the best and the worst."""

from __future__ import annotations

from lit_align.data.formats import Example
from lit_align.data.report import SplitReport
from lit_align.data.select import best_and_worst


def as_pair(example: Example, report: SplitReport) -> Example | None:
    """The best and the worst completion, best first; None, counted, where they do not differ.

    Args:
        example: A pair, or any number of scored completions.
        report: Receives what was dropped.
    """
    rewards = example.rewards
    if rewards is not None:
        chosen = best_and_worst(rewards)
        if chosen is None:
            report.drop("all rewards equal", example.place)
            return None
        completions = [example.completions[number] for number in chosen]
        example = example._replace(completions=completions, rewards=[rewards[number] for number in chosen])
    if example.completions[0] == example.completions[1]:
        report.drop("identical pair", example.place)
        return None
    return example
