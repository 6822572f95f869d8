"""The length tasks of arXiv 2404.14367 again, under a learned reward: Figures 5, 6, 10 to 13, 15, 17 and 20 to 23.

    python tools/reproduce/length.py --out docs/evidence --work runs/length          everything
    python tools/reproduce/length.py --parts Min --out runs/length                   one task, without the sweeps
    python tools/reproduce/length.py --figures --out docs/evidence                   tables and figures anew

Min wants the shortest completions, Mode those of the reference's usual length, and Skew is Min with a dataset of which
95% were cut short. Each task has a reward model, trained once on the dataset's completions ordered by their true
length; every method, offline ones too, is judged by that alone, and all that is reported is the true length of samples
on held-out prompts, beside what the reward model says of them. Every run is ``python -m lit_align fit`` on
``length.yaml`` and takes as many updates of as many completions. A study that was stopped goes on where it was. On Min
and on Mode each method tries the same learning rates, on a seed that is not reported, and takes the one of the largest
mean true reward over the run; on Skew it takes Min's.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from length_arms import Own, arms, quick, shorten
from length_curves import LengthReward, measured
from length_report import report
from trials.command import conduct, parse
from trials.plan import plan
from trials.results import series
from trials.study import Arm, Study
from trials.trial import APART, TRAINED, Options
from trials.workers import in_child, lit_align

RATES = ("0.0003", "0.001", "0.003", "0.01")
SECONDS = 30.0
"""CPU seconds of a run, measured on one core of a machine without a GPU."""
REWARD = Path(__file__).parents[2] / "configs" / "reward_model.yaml"


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments, __doc__, "length", CONFIG)
    own = Own.read(given.config)
    training: Options = {"trainer.max_steps": 2, "data.max_rows": 32} if given.quick else {}
    study = Study(
        name="length",
        config=given.config,
        arms=arms(own),
        grid={f"learning rate {rate}": {"model.optim.learning_rate": rate} for rate in RATES},
        criterion="gold over the run",
        data=partial(judged, given.work / "rewards", own, training),
        measure=partial(measure, given.work / "rewards", own, training),
    )
    study = quick(study) if given.quick else study
    if not given.figures:
        print(plan(study, given, SECONDS), flush=True)
    return conduct(given, study, report(given.out))


CONFIG = Path(__file__).parent / "length.yaml"


def judged(rewards: Path, own: Own, training: Options, arm: Arm, seed: int) -> Options:
    """The task's reward model, trained if it is not there."""
    folder = reward_run(rewards, own, training, arm.facts["task"])
    if not (folder / TRAINED).exists():
        print(f"training the reward model of {arm.facts['task']}: {folder}", flush=True)
        in_child(partial(train, arm.facts["task"], own, training, folder))
        (folder / TRAINED).touch()
    own_samples: Options = {"samples.seed": seed + APART}
    return {"data.reward": "lit_align.rewards.TrainedReward", "data.reward.path": folder / "adapter", **own_samples}


def reward_options(own: Own, training: Options, task: str) -> dict[str, object]:
    """What a task's reward model is trained on: the dataset's completions, ordered by true length."""
    options: dict[str, object] = {"model.pair": json.dumps(own.pair), "data": "ScoredGroups"}
    options |= {"data.dataset": own.dataset, "data.select": "ranked", "data.reward": "lit_align.rewards.Length"}
    if own.validation is not None:
        options["data.validation_dataset"] = own.validation
    if task == "Mode":
        options["data.reward.target"] = own.target
    plain = {"trainer.accelerator": own.accelerator, "trainer.enable_progress_bar": False}
    return {**options, **shorten(task), **plain, **training}


def reward_run(rewards: Path, own: Own, training: Options, task: str) -> Path:
    """The run folder of a task's reward model, another for other settings."""
    text = json.dumps([REWARD.read_text(encoding="utf-8"), reward_options(own, training, task)])
    return rewards / f"{task}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def train(task: str, own: Own, training: Options, folder: Path) -> None:
    """Train a reward model by the command line, which goes on with what was left of an earlier try."""
    given = {**reward_options(own, training, task), "run_dir": folder}
    command = ["fit", "--config", str(REWARD), *(f"--{key}={value}" for key, value in given.items()), "--resume"]
    if code := lit_align(command):
        raise RuntimeError(f"exit code {code} of: python -m lit_align {' '.join(command)}")


def measure(rewards: Path, own: Own, training: Options, arm: Arm, folder: Path) -> dict[str, Any]:
    """What is read off a run, and how often its reward model tells the best from the worst of a validation group."""
    task = arm.facts["task"]
    found = measured(folder, LengthReward(own.target if task == "Mode" else None), arm.facts)
    seen = series(reward_run(rewards, own, training, task), {"accuracy": "val/rewards/accuracies"})
    found["final"]["reward model"] = seen["accuracy"][-1]
    return found


if __name__ == "__main__":
    sys.exit(main())
