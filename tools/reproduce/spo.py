"""SPO against DPO again, after Figure 1 of arXiv 2405.00747: win rate against the reference over training.

    python tools/reproduce/spo.py --out docs/evidence --work runs/spo                everything
    python tools/reproduce/spo.py --parts figure1 --out runs/spo                     the grids alone
    python tools/reproduce/spo.py --figures --out docs/evidence                      tables and figures anew
    python tools/reproduce/spo.py --config my.yaml --reward my_rewards.score         other data, which brings no reward

Every run is ``python -m lit_align fit`` on ``spo.yaml``, and what is reported of it is what that draws now and then on
held-out prompts, against what the reference wrote there. A study that was stopped goes on where it was. Both methods
try the same learning rates, at one setting of their own hyperparameters and on a seed that is not reported, and take
the one of the largest mean win rate over the run for all of their settings.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from spo_arms import arms, quick
from spo_report import report
from spo_wins import judge, measured
from trials.command import conduct, parse
from trials.plan import plan
from trials.study import Arm, Study
from trials.workers import in_child

RATES = ("0.0003", "0.001", "0.003", "0.01")
SECONDS = 65.0
"""CPU seconds of a run, measured on one core of a machine without a GPU."""
CONFIG = Path(__file__).parent / "spo.yaml"


def main(arguments: list[str] | None = None) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--reward")
    mine, rest = own.parse_known_args(arguments)
    given = parse(rest, __doc__, "spo", CONFIG)
    study = Study(
        name="spo",
        config=given.config,
        arms=arms(),
        grid={f"learning rate {rate}": {"model.optim.learning_rate": rate} for rate in RATES},
        criterion="over the run",
        data=lambda arm, seed: {},
        measure=partial(measure, mine.reward),
    )
    study = quick(study) if given.quick else study
    if not given.figures:
        print(plan(study, given, SECONDS), flush=True)
    return conduct(given, study, report(given.out))


def measure(reward: str | None, arm: Arm, folder: Path) -> dict[str, Any]:
    """What is read off a run, whose samples are judged by another reward first if one is named."""
    if reward is not None:
        in_child(partial(judge, folder, reward))
    return measured(folder)


if __name__ == "__main__":
    sys.exit(main())
