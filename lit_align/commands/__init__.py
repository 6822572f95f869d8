"""The subcommands that use a run's results, one file each; none is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from lit_align.quiet import quiet_warnings

COMMANDS = {
    "evaluate": "reward, KL and win rates of a run's policy, with standard errors; best of N",
    "export": "an adapter or a merged model to load elsewhere, with a card; checks for vLLM",
    "generate": "complete prompts or chat, policy and reference side by side",
    "compare": "several runs in one table and pictures",
    "doctor": "data, chat template, token masks and versions of a run that has not started",
}
"""Name of each subcommand, which is its file, and what it is for; the file has a function ``run``."""

LIGHT = frozenset({"compare", "export"})
"""Those that have no use for Lightning."""


def run_command(name: str, args: Sequence[str]) -> None:
    """Run a subcommand.

    Args:
        name: One of ``COMMANDS``.
        args: What follows it on the command line.

    Raises:
        UserError: For what the user can put right.
    """
    if name not in LIGHT:
        from lit_align.lean import import_lightning

        import_lightning()
    quiet_warnings()
    importlib.import_module(f"{__name__}.{name}").run(list(args))
