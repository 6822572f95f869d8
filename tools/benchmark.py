"""Time and memory of our step beside TRL's and beside the matrix products it cannot do without, in one run.

    LIT_ALIGN_DATA=… python tools/benchmark.py --out benchmark.json
    python tools/benchmark.py --quick

All sides take turns on the same batches: forward of policy and reference, gradient, clipping and optimizer step of a
LoRA of rank 16 in float32. Models have random weights and are made on the spot; the pairs are Anthropic's HH harmless
test split where LIT_ALIGN_DATA names a folder with it, and random ids elsewhere.

The columns: useful tokens a second (each prompt counted once, whatever a side makes of it), median wall seconds of a
step on all threads, CPU seconds on one thread (which other programs disturb less), bytes a step takes beyond those held
after loading (each side in a process of its own), and the share of places of the forward pass that hold padding. × is
the ratio to the first row of the table, repeat by repeat: the median, and the smallest and largest.

The sides: "TRL" is trl.DPOTrainer at its defaults but for float32, its gradient checkpointing included. On a CPU its
vocabulary head runs on every position, on a GPU on those of completions only; "head as on a GPU" makes it do so here as
well, and keeps activations. "limit" is 6 N FLOPs a distinct token at the model's shapes, N without the head for tokens
that are not scored; "head everywhere" counts it for all.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

from benchmarking.clock import take_turns
from benchmarking.experiments import Experiment, build, chosen
from benchmarking.memory import peak
from benchmarking.models import make
from benchmarking.report import Result, as_json, tables
from benchmarking.sides import Limit
from benchmarking.work import distinct_tokens
from rich.console import Console


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, _, rest = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=raw)
    add = parser.add_argument
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", help="a smoke test, 1 to 2 minutes")
    sizes.add_argument("--smallest", dest="size", action="store_const", const="smallest", help="one row, without TRL")
    add("--only", nargs="*", default=[], metavar="ROWS", help="names of tables, such as hh k8")
    add("--repeats", type=int, default=3, help="timed steps of each side")
    add(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="threads for the wall time; 0 leaves it out, for a busy machine",
    )
    add("--out", type=Path, help="write the figures to this JSON file, after each table")
    parser.set_defaults(size="full")
    given = parser.parse_args(arguments)
    if given.repeats < 1 or given.threads < 0:
        parser.error("--repeats must be 1 or more, --threads 0 or more")
    return given


def run(experiment: Experiment, repeats: int, threads: int, folder: Path) -> dict[str, Result]:
    """Measure every side of an experiment."""

    def say(what: str) -> None:
        print(f"{experiment.key}: {what}", file=sys.stderr, flush=True)

    model, batches = make(experiment.shape, folder), experiment.work.batches
    sides = {name: build(name, model) for name in experiment.sides}
    timings = take_turns(sides, batches, repeats, threads, say)
    largest, found = max(batches, key=distinct_tokens), {}
    for name, side in sides.items():
        bare = isinstance(side, Limit)
        memory = None
        if experiment.memory and not bare:
            say(f"peak memory, {name}")
            memory = peak(name, model, largest, folder)
        cells = [(0, 1)] if bare else [side.cells(batch) for batch in batches]
        padding = None if bare else 1 - sum(used for used, _ in cells) / sum(there for _, there in cells)
        found[name] = Result(
            timings[name], memory, padding, side.flops(batches[0]) if isinstance(side, Limit) else None
        )
    return found


def quiet() -> None:
    """Silence bars and hints of the libraries."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write the file."""
    given = parse(arguments)
    quiet()
    repeats = given.repeats if given.size == "full" else 1
    with tempfile.TemporaryDirectory() as folder:
        experiments = chosen(given.size, repeats, given.only)
        results: dict[str, dict[str, Result]] = {}
        for one in experiments:
            results[one.key] = run(one, repeats, given.threads, Path(folder))
            if given.out is not None:  # after each, so that a run that is cut short leaves something
                written = as_json(experiments[: len(results)], results, given.threads)
                given.out.write_text(json.dumps(written, indent=1), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 150)
    for table in tables(experiments, results):
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
