"""Importing Lightning without transformers, which torchmetrics otherwise loads for a metric nobody here uses.

It takes a second, and ``--help`` and ``--print_config`` have no use for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

HIDDEN = "transformers"


def import_lightning() -> None:
    """Import ``lightning.pytorch`` and ``torchmetrics`` with transformers hidden from their checks of what is there."""
    with _hidden():
        importlib.import_module("lightning.pytorch")
        importlib.import_module("torchmetrics")


@contextmanager
def _hidden() -> Iterator[None]:
    from lightning_utilities.core.imports import RequirementCache

    original = RequirementCache._check_requirement

    def check(self: RequirementCache) -> None:
        original(self)
        if self.requirement is not None and self.requirement.startswith(HIDDEN):
            self.available = False

    RequirementCache._check_requirement = check  # type: ignore[method-assign]
    try:
        yield
    finally:
        RequirementCache._check_requirement = original  # type: ignore[method-assign]
