"""Entry point of ``python -m lit_align``: answers what needs no torch, then hands over to the command line proper."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_align import __version__
from lit_align.commands import COMMANDS, run_command
from lit_align.quiet import quiet_libraries

SUBCOMMANDS = {
    "fit": "train a policy; writes a run folder with the adapter, metrics, samples and a model card",
    "validate": "score held-out preferences, of the untrained model, or of --resume or --ckpt_path",
    **COMMANDS,
}
TRACEBACK = "LIT_ALIGN_TRACEBACK"
INTERRUPTED = 130
"""Exit code after Ctrl-C, 128 + SIGINT; after another signal it is 128 + that one, such as 143 after SIGTERM."""


def usage() -> str:
    """The top-level help: subcommands, examples, where configs live and which are here."""
    commands = "\n".join(f"  {name:<10}{text}" for name, text in SUBCOMMANDS.items())
    found = sorted(str(path) for path in Path("configs").rglob("*.yaml"))
    config = next((path for path in found if "hardware" not in path), "configs/OBJECTIVE.yaml")
    listed = "\n".join(f"  {path}" for path in found) or "  (there is no folder configs here)"
    return f"""lit_align {__version__}: align a language model with preferences.

Usage: python -m lit_align SUBCOMMAND [--config FILE]... [--KEY VALUE]...

Subcommands:
{commands}

Examples:
  python -m lit_align fit --config {config}
  python -m lit_align fit --config {config} --config configs/hardware/gpu_24gb.yaml \\
      --model.pair.model Qwen/Qwen2.5-0.5B-Instruct --data.dataset trl-lib/ultrafeedback_binarized
  python -m lit_align fit --config {config} --print_config     the whole configuration, nothing is run
  python -m lit_align evaluate runs/OBJECTIVE/TIME --best_of 16
  python -m lit_align export runs/OBJECTIVE/TIME --out my_adapter

Configs are YAML files under configs/: one for each objective, and overlays for hardware to put on top.
A later --config, and then the command line, win. Here:
{listed}

Help:
  python -m lit_align fit --help                     every option of the trainer and the callbacks
  python -m lit_align fit --model.help OBJECTIVE     the options of an objective
  python -m lit_align evaluate --help                the options of another subcommand
  python -m lit_align --version
{TRACEBACK}=1 in the environment shows the traceback of an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes them from ``sys.argv``.

    Returns:
        The exit code: 0; 2 for what the user can put right; 128 + the signal's number for a run that a signal ended.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in {"-h", "--help", "help"}:
        print(usage(), end="")
        return 0
    if args[0] in {"-V", "--version"}:
        print(f"lit_align {__version__}")
        return 0
    if args[0] not in SUBCOMMANDS:
        return _complain(_unknown(args[0]))
    quiet_libraries()
    try:
        if args[0] in COMMANDS:
            run_command(args[0], args[1:])
        else:
            _train(args)
    except KeyboardInterrupt as end:
        return 128 + getattr(end, "signal", signal.SIGINT)
    except Exception as error:
        from lit_align.mistakes import for_the_user

        message = for_the_user(error)
        if message is None or os.environ.get(TRACEBACK):
            raise
        return _complain(message)
    return 0


def _train(args: Sequence[str]) -> None:
    from lit_align.lean import import_lightning

    import_lightning()
    from lit_align.cli import run

    run(args)


def _unknown(word: str) -> str:
    near = difflib.get_close_matches(word, SUBCOMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(SUBCOMMANDS)} comes first."
    return f"{word!r} is no subcommand; {hint} See python -m lit_align --help"


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
