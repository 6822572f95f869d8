"""Hold out part of the training groups for validation, by prompt."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from lit_align.data.collate import Group
from lit_align.data.report import SplitReport
from lit_align.data.rows import DataError


def prompt_key(group: Group) -> bytes:
    """Equal exactly for groups with equal prompt tokens."""
    return group.prompt_ids.numpy().tobytes()


def distinct_prompts(groups: Iterable[Group], most: int) -> list[Group]:
    """The first group of each of the first ``most`` distinct prompts."""
    first: dict[bytes, Group] = {}
    for group in groups:
        if len(first) == most:
            break
        first.setdefault(prompt_key(group), group)
    return list(first.values())


def hold_out(groups: Sequence[Group], size: int | float, seed: int) -> tuple[list[Group], list[Group]]:
    """Split groups so that no prompt is on both sides.

    Prompts are ranked by a hash of their tokens and the seed, and taken until there are enough rows; so a prompt's
    rank does not depend on the order of the rows or on which others there are.

    Args:
        groups: All groups; those of one row have the same prompt.
        size: Rows to hold out: a number of them if int, > 0, or a share if float, in (0, 1). At least one is held
            out; a prompt with several rows may make it a few more.
        seed: Any integer.

    Returns:
        The groups to train on and those held out, each in their order.

    Raises:
        DataError: If this would leave nothing to train on.
    """
    by_prompt: defaultdict[bytes, set[int]] = defaultdict(set)
    for group in groups:
        by_prompt[prompt_key(group)].add(group.row)
    rows = sum(map(len, by_prompt.values()))
    target = size if isinstance(size, int) else max(1, round(size * rows))
    held: set[bytes] = set()
    count = 0
    for key in sorted(by_prompt, key=lambda key: hashlib.sha256(str(seed).encode() + b" " + key).digest()):
        if count >= target:
            break
        held.add(key)
        count += len(by_prompt[key])
    if len(held) == len(by_prompt):
        raise DataError(
            f"validation_size={size} would hold out all of {rows} rows ({len(by_prompt)} distinct prompts) "
            "and leave none to train on; make it smaller, give a validation_dataset, or set it to 0 for no validation"
        )
    train = [group for group in groups if prompt_key(group) not in held]
    return train, [group for group in groups if prompt_key(group) in held]


def note_shared(train: Sequence[Group], validation: Sequence[Group], report: SplitReport) -> None:
    """Count the validation rows whose prompt is trained on.

    Args:
        train: Groups trained on.
        validation: Groups validated on.
        report: Of validation; receives the counts.
    """
    trained = {prompt_key(group) for group in train}
    for group in {group.row: group for group in validation}.values():
        if prompt_key(group) in trained:
            report.note("prompt also in training", f"row {group.row}")
