"""Kill training runs at random moments, start them again by the same command, and hold them against undisturbed ones.

    python tools/kill_test.py --kills 200 --flips 1000 --out runs/kills

Each kill is a real SIGKILL, aimed at a forward pass, a backward pass, an optimizer step or the saving of a checkpoint,
whichever was struck least so far; where it struck is counted. A run is killed a few times, then it is let to end:
the losses in its ``metrics.csv`` and the bytes of its adapter must be those of a run that was never disturbed. Then
single bytes of a checkpoint are changed, and each change must be noticed when it is read. On a CPU, where runs repeat
bit for bit. Any fault makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from killing.trial import Reference, Tally, flips, trial, undisturbed
from killing.watched import PHASES, instrument

from lit_align.__main__ import main as command_line

CONFIGS = ("eps_dpo", "dpo", "beta_dpo", "tr_dpo", "on_policy_dpo", "spo")
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=6",
    "--trainer.max_epochs=-1",
    "--trainer.log_every_n_steps=1",
    "--checkpoints.every_n_steps=2",
    "--samples.prompts=0",
    "--data.max_rows=40",
]
"""Short runs, whose every step is logged."""
SMALL = {"OnPolicyData": ["--data.buffer=16", "--data.minibatch=8", "--data.max_new_tokens=8"]}
BATCHES = ["--data.batch_size=4", "--data.validation_size=0"]


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    random.seed(given.seed)
    given.out.mkdir(parents=True)
    begin, tally = time.monotonic(), Tally()
    references = prepare(given)
    names, number = list(references), 0
    while (left := given.kills - sum(tally.kills.values())) > 0 and not tally.faults:
        name = names[number % len(names)]
        args, reference = references[name]
        trial(args, reference, given.out / f"{name}-{number}", min(left, given.kills_per_run), tally)
        number += 1
        print(f"{sum(tally.kills.values())}/{given.kills} kills, {tally.runs} runs ended as undisturbed", flush=True)
    _, reference = references[names[0]]
    noticed = flips(reference.folder / "checkpoints" / "last.ckpt", given.flips)
    return report(given, tally, noticed, time.monotonic() - begin)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=200)
    add("--kills_per_run", type=int, default=5, help="after so many the run is let to end and compared")
    add("--flips", type=int, default=1000, help="single bytes of a checkpoint to change")
    add("--configs", nargs="+", default=list(CONFIGS), help="names of files in configs/, without .yaml")
    add("--options", nargs=argparse.REMAINDER, default=[], help="further options of fit, last")
    add("--seed", type=int, default=0, help="of the moments")
    add("--out", type=Path, required=True, help="a folder that is not there yet")
    return parser.parse_args(arguments)


def prepare(given: argparse.Namespace) -> dict[str, tuple[list[str], Reference]]:
    """The command line and the undisturbed run of each config; everything is imported by a first short one."""
    instrument()
    found = {}
    for name in given.configs:
        path = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
        own = next((more for kind, more in SMALL.items() if kind in path.read_text(encoding="utf-8")), BATCHES)
        args = ["fit", "--config", str(path), *SHORT, *own, *given.options]
        if not found:
            with silent(given.out / "warm.log"):
                command_line([*args, f"--run_dir={given.out / 'warm'}", "--trainer.max_steps=1"])
        found[name] = args, undisturbed(args, given.out / f"{name}-undisturbed", given.out / f"{name}.log")
        print(f"{name}: undisturbed run done", flush=True)
    return found


class silent:
    """Within this context what the process prints goes to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        sys.stdout.flush()
        self._kept = os.dup(1)
        with self.path.open("w") as file:
            os.dup2(file.fileno(), 1)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        os.dup2(self._kept, 1)
        os.close(self._kept)


def report(given: argparse.Namespace, tally: Tally, noticed: int, seconds: float) -> int:
    """Print and write down the result; 0 if nothing went wrong."""
    result = {
        "configs": given.configs,
        "kills": sum(tally.kills.values()),
        "where": {phase: tally.kills[phase] for phase in PHASES},
        "runs ended as undisturbed": tally.runs,
        "steps lost that a checkpoint held": tally.lost,
        "steps taken again": tally.redone,
        "bytes changed": given.flips,
        "changes noticed": noticed,
        "faults": tally.faults,
        "seconds": round(seconds),
    }
    text = json.dumps(result, indent=2)
    print(text)
    (given.out / "result.json").write_text(text + "\n", encoding="utf-8")
    return int(bool(tally.faults) or noticed < given.flips)


if __name__ == "__main__":
    sys.exit(main())
