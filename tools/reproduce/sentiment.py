"""Controlled sentiment after arXiv 2402.00856: Figures 2, 3, 6 to 8, Tables 1, 2 and 5.

    python tools/reproduce/sentiment.py --search_seeds 2 --out docs/evidence --work runs/sentiment     everything
    python tools/reproduce/sentiment.py --out runs/sentiment --parts frontier         the frontier alone
    python tools/reproduce/sentiment.py --figures --out docs/evidence                           tables and figures anew

Every run is ``python -m lit_align fit`` on ``sentiment.yaml``. Reported of it is what lit_align samples while it
learns (reward, share of positive answers, KL), what ``python -m lit_align evaluate`` says of it, and for the density
ratios its log-ratios of the reference's own answers. All methods see as many completions in as many steps, try the same
learning rates on a seed that is not reported, and take the one of the largest objective at the last step, which is
reward - β KL.

``sentiment_reference.json`` has best of N, which needs no training.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sentiment_world as world
import yaml
from sentiment_arms import BETA, arms, quick, seconds
from sentiment_ratio import against_the_optimum
from sentiment_report import report
from trials.after import answer, evaluation, standing
from trials.command import conduct, parse
from trials.plan import plan
from trials.results import all_samples, draws, write_json
from trials.study import SEARCH_SEED, Arm, Study
from trials.trial import Options
from trials.workers import import_all

RATES = ("0.0001", "0.0003", "0.001", "0.003", "0.01")
POSITIVE = 0.05
"""The compound score from which VADER's authors call a text positive."""
OFTEN = 2
"""Steps between two checkpoints of a frontier: the fastest methods are ten nats away after eight steps."""
BEFORE = 110.0
"""CPU seconds of what all runs read, as measured."""


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments, __doc__, "sentiment", Path(__file__).parent / "sentiment.yaml")
    own = world.Own.read(given.config)
    if given.quick:
        own = replace(own, rows=6, tokens=12, prompts=4, steps=1, every=1, answers=4)
    place = given.work / own.world
    study = Study(
        name="sentiment",
        config=given.config,
        arms=arms(own),
        grid={f"learning rate {rate}": {"model.optim.learning_rate": rate} for rate in RATES},
        criterion="objective",
        data=partial(files, place, own),
        measure=partial(measure, place, own),
    )
    study = quick(study) if given.quick else study
    if not given.figures:
        chosen = study.chosen_parts(given.parts)
        print(plan(study, given, statistics.fmean(map(seconds, chosen)) + BEFORE / len(chosen)), flush=True)
        import_all(study.config)
        given.out.mkdir(parents=True, exist_ok=True)
        write_json(given.out / "sentiment_reference.json", of_reference(world.reference(place, own), own))
    return conduct(given, study, report(given.out))


def files(place: Path, own: world.Own, arm: Arm, seed: int) -> Options:
    """What a run reads, made if it is not there, and how long it runs."""
    found: dict[str, object] = {"data.dataset": world.groups(place, own), "data.validation_dataset": own.dataset}
    every = min(OFTEN, own.every) if arm.part == "frontier" and seed < SEARCH_SEED else own.every
    found |= {"trainer.max_steps": own.steps, "samples.prompts": own.prompts, "samples.every_n_steps": every}
    if arm.facts.get("fresh"):
        found |= {"data.reward": "lit_align.rewards.TrainedReward", "data.reward.path": world.reward_model(place, own)}
    elif arm.facts.get("proxy"):
        found |= {"data.dataset": world.proxy(place, own), "data.reward": "null"}
    return found | ({"samples.prompts": 0} if arm.facts.get("proxy") else {})


def measure(place: Path, own: world.Own, arm: Arm, folder: Path) -> dict[str, Any]:
    """What is read off a run: its checkpoints, and what is asked of it afterwards."""
    final: dict[str, Any] = {}
    curve: dict[str, list[float]] = {"step": []}
    if not arm.facts.get("proxy"):
        curve = checkpoints(folder)
        final = {f"{name} at {step:.0f}": curve[name][i] for i, step in enumerate(curve["step"]) for name in AT}
        final |= {name: curve[name][-1] for name in (*AT, "spread", "tokens")}
    seed = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["seed_everything"]
    if arm.facts.get("judged") and seed < SEARCH_SEED:
        final = {**standings(place, own, folder, seed), **final}
    if arm.facts.get("ratio"):
        ask = partial(against_the_optimum, folder, world.reference(place, own), arm.facts["beta"])
        found = answer(folder, "ratio", ask)
        final |= found["divergences"]
        curve = found["curve"]
    beta = arm.facts.get("beta", BETA)
    final["objective"] = final["reward"] - beta * final["kl"]
    if arm.facts.get("ratio"):
        final["reverse"] = final["log Z"] - final["objective"] / beta
    return {"final": final, "curve": curve}


AT = ("reward", "kl", "positive")
"""What is kept of every checkpoint of every seed."""


def checkpoints(folder: Path) -> dict[str, list[float]]:
    """What the samples of a run say at each checkpoint, the reference first; ``spread`` is over all its samples."""
    rows = all_samples(folder)
    steps = draws(folder)
    rewards = {
        step: [row["reward"] for row in rows if row["step"] == step and row["reward"] is not None] for step in steps
    }
    return {
        "step": list(steps),
        "reward": [statistics.fmean(rewards[step]) for step in steps],
        "spread": [statistics.stdev(rewards[step]) for step in steps],
        "positive": [statistics.fmean(value >= POSITIVE for value in rewards[step]) for step in steps],
        "kl": [one["kl"]["mean"] for one in steps.values()],
        "tokens": [one["tokens"] for one in steps.values()],
    }


def standings(place: Path, own: world.Own, folder: Path, seed: int) -> dict[str, float]:
    """Win rates against the reference and against the dataset's chosen, by the reward model and by the oracle."""
    rewards = {"reward model": world.reward_model(place, own), "oracle": own.reward}
    options: dict[str, object] = {"dataset": own.dataset, "prompts": own.prompts, "completions": 2, "seed": seed}
    final: dict[str, float] = {}
    for name, reward in rewards.items():
        given = {**options, "reward": reward, "max_new_tokens": own.tokens}
        found = evaluation(folder, name.replace(" ", "_"), given)
        for first, said in (("policy", ""), ("reference", "SFT ")):
            for second in ("reference", "chosen"):
                rate = standing(found, first, second).get("raw")
                final |= {} if rate is None else {f"{said}against {second}, {name}": rate}
        final |= {
            key: found["candidates"]["policy"][key]["mean"] for key in ("reward", "kl")
        }  # the oracle's comes last
    return final


def of_reference(answers: Path, own: world.Own) -> dict[str, Any]:
    """Best of N of the reference's answers, with standard errors over prompts, and its KL, log N - (N - 1)/N."""
    from lit_align.commands.statistics import best_of, best_of_kl, over_prompts

    _, rewards = world.read_reference(answers)
    best = []
    for n in [2**i for i in range(int(math.log2(own.answers)) + 1)]:
        weight = best_of(rewards, n)
        values = {"reward": rewards, "positive": (rewards >= POSITIVE).double()}
        found = {name: over_prompts((one * weight).sum(1))._asdict() | {"n": len(one)} for name, one in values.items()}
        best.append({"N": n, "kl": best_of_kl(n), **found, "rewards": (rewards * weight).sum(1).tolist()})
    sizes = {"prompts": rewards.shape[0], "answers": rewards.shape[1], "spread": rewards.std().item()}
    return {"study": "sentiment", **sizes, "best of N": best}


if __name__ == "__main__":
    sys.exit(main())
