"""The command line of ``tools/build_stories.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

QUICK: dict[str, Any] = {
    "batches": 2,
    "rows": 100,
    "row_tokens": 12,
    "workers": 1,
    "vocabulary": 300,
    "hidden": 32,
    "layers": 1,
    "heads": 2,
    "intermediate": 48,
    "pretrain_steps": 100,
    "finetune_steps": 150,
    "train_rows": 8,
    "learning_rate": 2e-2,
    "train_prompts": 8,
    "validation_prompts": 2,
    "candidates": 3.0,
    "spread": 0.0,
    "completions": 2,
}


def _parser(description: str, stages: Sequence[str]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("stages", nargs="*", help=f"of: {', '.join(stages)}; all where none is named")
    add("--teacher", required=True, help="directory or Hub name of a causal LM that tells stories after its BOS")
    add("--teacher_name", help="what the model card calls it, with its licence; the last part of --teacher by default")
    add("--work", type=Path, required=True, help="folder of what the stages leave for each other")
    add("--out", type=Path, required=True, help="folder to write the package to")
    add("--again", action="store_true", help="repeat stages that are done")
    add("--quick", action="store_true", help="everything tiny: for a check that the tool runs")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--workers", type=int, default=2, help="sampling processes")
    add("--seed", type=int, default=0)
    add("--batches", type=int, default=46, help="teacher batches to sample")
    add("--rows", type=int, default=400, help="rows of a teacher batch")
    add("--row_tokens", type=int, default=104, help="tokens of a teacher row")
    add("--temperature", type=float, default=0.75, help="of the teacher")
    add("--varied", type=int, default=16, help="first tokens of a teacher row, drawn at temperature 1")
    add("--pieces", type=int, default=4000, help="teacher pieces that may be drawn: the likeliest ones")
    add("--vocabulary", type=int, default=4096, help="tokens of our tokenizer")
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--intermediate", type=int, default=688)
    add("--context", type=int, default=512, help="positions the model takes")
    add("--pretrain_steps", type=int, default=886)
    add("--pretrain_seconds", type=float, default=1e9, help="time limit; a rebuild is repeatable below it")
    add("--finetune_steps", type=int, default=170)
    add("--finetune_seconds", type=float, default=1e9)
    add("--train_rows", type=int, default=48, help="rows of 128 tokens a step")
    add("--learning_rate", type=float, default=5e-3, help="peak in pretraining; ends at 0.3 of it, where tuning begins")
    add("--sharpen", type=float, default=1.25, help="factor of the logits of the model that ships")
    add("--positive_share", type=float, default=0.25, help="share of the positive continuations that is trained on")
    add("--budget", type=int, default=64, help="tokens of a completion")
    add("--completions", type=int, default=4)
    add("--train_prompts", type=int, default=1000)
    add("--validation_prompts", type=int, default=100)
    add("--candidates", type=float, default=1.5, help="prompts to draw completions of, per prompt wanted")
    add("--spread", type=float, default=0.3, help="least difference of a prompt's best and worst reward")
    return made


def parse(arguments: Sequence[str] | None, description: str, stages: Sequence[str]) -> argparse.Namespace:
    """What the user asked for.

    Args:
        arguments: Words of the command line; None takes the program's own.
        description: Head of the help.
        stages: Names of the stages there are.
    """
    parser = _parser(description, stages)
    given = parser.parse_args(arguments)
    if given.quick:
        parser.set_defaults(**QUICK)
        given = parser.parse_args(arguments)
    if unknown := [stage for stage in given.stages if stage not in stages]:
        parser.error(f"no stage is called {', '.join(unknown)}; there are {', '.join(stages)}")
    return given
