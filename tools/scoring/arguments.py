"""The command line of ``tools/score.py``."""

from __future__ import annotations

import argparse
from pathlib import Path


def parse(arguments: list[str] | None, description: str) -> argparse.Namespace:
    """Read the command line; what cannot be is refused with the usage."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--dataset", default="stories", help="stories, a file, a folder or a Hub name, as for training")
    add("--split", default="train", help="which split, where the dataset has splits")
    add("--columns", nargs="*", default=[], metavar="OURS=YOURS", help="names of columns, such as prompt=question")
    add("--max_rows", type=int, help="read at most this many rows")
    add("--model", help="draw completions from this model: stories, a folder or a Hub name")
    add("--adapter", help="with --model: the folder of a trained adapter")
    add("--revision", help="with --model: branch, tag or commit on the Hub")
    add("--completions", type=int, default=4, help="with --model: completions of each prompt")
    add("--max_new_tokens", type=int, default=64, help="with --model: token budget of a completion")
    add("--max_length", type=int, default=512, help="with --model: tokens of a prompt and its completion")
    add("--temperature", type=float, default=1.0, help="with --model: divides the logits")
    add("--top_k", type=int, default=0, help="with --model: keep the k likeliest tokens; 0 keeps all")
    add("--top_p", type=float, default=1.0, help="with --model: keep the likeliest tokens of this mass")
    add("--seed", type=int, default=0, help="with --model: seed of the draws")
    add("--reward", required=True, help="folder adapter of a trained reward, or a name such as lit_align.rewards.Vader")
    add("--batch_size", type=int, default=16, help="prompts drawn and judged together")
    add("--out", type=Path, required=True, help="the .jsonl file to write; it must not exist")
    given = parser.parse_args(arguments)
    checks = {
        "--completions must be 1 or more": given.completions >= 1,
        "--batch_size must be 1 or more": given.batch_size >= 1,
        "--max_new_tokens must be from 1 to max_length - 1": 1 <= given.max_new_tokens < given.max_length,
        "--temperature must be greater than 0": given.temperature > 0,
        "--top_p must be in (0, 1]": 0 < given.top_p <= 1,
        "--adapter needs --model": given.model or not given.adapter,
        "--columns are written OURS=YOURS": all("=" in pair for pair in given.columns),
        f"--out {given.out} exists; choose another name": not given.out.exists(),
    }
    for problem in (text for text, holds in checks.items() if not holds):
        parser.error(problem)
    return given
