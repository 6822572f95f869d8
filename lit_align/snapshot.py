"""What the models say of a whole buffer before anything is learned from it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lit_align.batch import CompletionBatch, Scores

COMPLETIONS_AT_ONCE = 32
"""Completions scored in one pass, whole groups: a buffer may be larger than what fits in memory. Without gradient a
pass keeps no activations, so this costs less than a training micro-batch of as many."""


@torch.no_grad()
def snapshot(score: Callable[[CompletionBatch], Scores], batch: CompletionBatch) -> Scores:
    """Scores of a buffer, a few groups at a time, without gradient.

    Args:
        score: Scores a batch.
        batch: The buffer, B groups of K completions.

    Returns:
        The scores of all groups; fields that ``score`` leaves out are None, and so are the mixtures of ε-DPO.
    """
    size = max(1, COMPLETIONS_AT_ONCE // batch.present.shape[1])
    parts = [score(batch.rows(slice(at, at + size))) for at in range(0, len(batch.row), size)]
    columns = zip(*(part._replace(perturbed=None) for part in parts), strict=True)
    return Scores._make(None if column[0] is None else torch.cat(column) for column in columns)
