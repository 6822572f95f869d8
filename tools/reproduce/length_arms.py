"""The arms of the length tasks: which settings make which line of which figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from trials.study import Arm, Study
from trials.trial import Options

TASKS = ("Min", "Skew", "Mode")
FRESH: dict[str, Options] = {
    "on-policy DPO": {"model": "DPO", "data.select": "best_and_worst"},
    "PPO": {"model": "PPO", "data.select": "ranked"},
    "RWR": {"model": "RWR", "data.select": "ranked"},
    "REINFORCE": {"model": "REINFORCE", "data.select": "ranked"},
    "best-of-N": {"model": "BestOfN", "data.select": "best"},
    "best-of-N, negative gradient": {"model": "BestOfN", "model.negative_coef": 1.0, "data.select": "ranked"},
}
"""Methods on completions of the policy, each an objective of lit_align with its defaults."""

FIXED: dict[str, Options] = {
    "offline DPO": {"model": "DPO", "data.select": "best_and_worst"},
    "Pref-FT": {"model": "BestOfN", "data.select": "best"},
}
"""Methods on the dataset's completions; Pref-FT is -log π of the best, summed over its tokens as in best-of-N."""

SWEPT = ("on-policy DPO", "PPO", "RWR")
BUFFERS = (4, 24)
"""|D|/M, beside 1; the last is one collection for the whole run."""
PASSES = (2, 6)
"""T on the smaller of these, beside 1."""


@dataclass(frozen=True)
class Own:
    """What the study's YAML says.

    Attributes:
        pair: The model and its adapter, as the YAML has them.
        dataset: Rows with prompts and completions.
        validation: The same for validation, or None.
        target: The length that Mode wants, in tokens.
        completions: Of each prompt.
        minibatch: Completions of an update.
        steps: Updates of a run.
        every: Updates between two draws of samples.
        accelerator: Of the trainer.
    """

    pair: dict[str, Any]
    dataset: str
    validation: str | None
    target: int
    completions: int
    minibatch: int
    steps: int
    every: int
    accelerator: str

    @classmethod
    def read(cls, config: Path) -> Own:
        """From the YAML, which is one update for each collection."""
        text = yaml.safe_load(config.read_text(encoding="utf-8"))
        data, trainer = text["data"]["init_args"], text["trainer"]
        return cls(
            pair=text["model"]["init_args"]["pair"],
            dataset=data["dataset"],
            validation=data.get("validation_dataset"),
            target=data["reward"]["init_args"]["target"],
            completions=data["completions"],
            minibatch=data["minibatch"],
            steps=trainer["max_epochs"],
            every=text["samples"]["every_n_steps"],
            accelerator=trainer["accelerator"],
        )


def shorten(task: str) -> Options:
    """Skew's dataset: 95% of the completions end early."""
    return {"data.shorten.share": 0.95, "data.shorten.mean": 10} if task == "Skew" else {}


def arms(own: Own) -> list[Arm]:
    """All arms, every one of as many updates."""
    return [arm for task in TASKS for arm in of_task(own, task)]


def of_task(own: Own, task: str) -> Iterator[Arm]:
    """The arms of one task; Skew is Min on other data and takes the learning rates that Min has found."""
    like = "Min" if task == "Skew" else None
    facts = {"task": task, "steps": own.steps, "every": own.every, "fresh": True}
    facts["few"] = BUFFERS[0] * own.minibatch
    for name, options in FRESH.items():
        base = Arm(f"{task} {name}", task, options, like and f"{like} {name}", {**facts, **drawn(own, 1, 1)})
        yield base
        if name in SWEPT:
            yield from swept(own, base)
    groups = own.minibatch // own.completions
    # Twice the rows that are used: the reward model judges all that are read before a run begins.
    kind = {"data": "ScoredGroups", "data.batch_size": groups, "data.max_rows": 2 * groups * own.steps, **shorten(task)}
    length = {"trainer.max_steps": own.steps, "trainer.limit_val_batches": 0}
    for name, options in FIXED.items():
        found = {**options, **kind, **length}
        yield Arm(f"{task} {name}", task, found, like and f"{like} {name}", {**facts, "fresh": False})


def swept(own: Own, base: Arm) -> Iterator[Arm]:
    """Larger buffers and, on Min, more passes, with the learning rate of the base and as many updates."""
    sizes = [(BUFFERS[-1], 1)] if base.facts["task"] == "Skew" else []
    if base.facts["task"] == "Min":
        sizes = [*((times, 1) for times in BUFFERS), *((BUFFERS[0], passes) for passes in PASSES)]
    for times, passes in sizes:
        if own.steps % (times * passes) == 0:
            options = {"data.buffer": own.minibatch * times, "data.passes": passes}
            options["trainer.max_epochs"] = own.steps // (times * passes)
            name = f"{base.name}, B {times}M, T {passes}"
            facts = {**base.facts, **drawn(own, times, passes)}
            yield Arm(name, f"{base.part}-swept", {**base.options, **options}, base.like or base.name, facts)


def drawn(own: Own, times: int, passes: int) -> dict[str, int]:
    """Updates on one buffer, and the completions it holds."""
    return {"updates": times * passes, "buffer": own.minibatch * times}


def quick(study: Study) -> Study:
    """The same in a few seconds: one task, two arms, one learning rate that one of them searches, two updates."""
    fresh, fixed = (arm for arm in study.arms if arm.name in ("Min on-policy DPO", "Min offline DPO"))
    facts = {"steps": 2, "every": 1}
    short: Options = {"trainer.log_every_n_steps": 1, "samples.prompts": 4, "samples.every_n_steps": 1}
    short = {**short, "samples.max_new_tokens": 8, "data.max_rows": 32}
    draws: Options = {"trainer.max_epochs": 2, "data.max_new_tokens": 8, "data.buffer": 8, "data.minibatch": 8}
    small = [replace(fresh, options={**fresh.options, **short, **draws}, facts={**fresh.facts, **facts})]
    options = {**fixed.options, **short, "trainer.max_steps": 2, "data.batch_size": 2}
    small.append(replace(fixed, options=options, like=fresh.name, facts={**fixed.facts, **facts}))
    label = list(study.grid)[1]
    return replace(study, arms=small, grid={label: study.grid[label]})
