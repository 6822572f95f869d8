"""The bandit of arXiv 2404.14367 again: Table 3, and Figures 4, 14, 16, 18 and 19.

    python tools/reproduce/bandit.py --out docs/evidence --work runs/bandit          everything, some hours
    python tools/reproduce/bandit.py --parts table3 --out runs/bandit                Table 3 alone
    python tools/reproduce/bandit.py --figures --out docs/evidence                   tables and figures anew

Every run is ``python -m lit_align fit`` on ``bandit.yaml``, and what is reported of it is what that measures: samples
of the trained policy on all contexts. A study that was stopped goes on where it was. Each method tries the same
learning rates, on seeds that are not reported, and takes the one of the largest mean reward at the end.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bandit_arms import Own, arms, quick
from bandit_report import report
from bandit_world import Peak, build, write_contexts, write_groups, write_prompts
from trials.command import conduct, parse
from trials.results import draws, samples, series
from trials.study import Arm, Study
from trials.trial import APART, Options
from trials.workers import in_child

RATES = ("0.3", "0.1", "0.03", "0.01", "0.003", "0.001", "0.0003", "0.0001", "3e-05", "1e-05")
"""The paper's: from 0.3 to 1e-5."""


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments, __doc__, "bandit", Path(__file__).parent / "bandit.yaml")
    study = whole(given.config, given.work)
    return conduct(given, quick(study) if given.quick else study, report(given.out))


def whole(config: Path, work: Path) -> Study:
    """All of the study, the files of its runs below ``work``."""
    own = Own.read(config)
    return Study(
        name="bandit",
        config=config,
        arms=arms(own),
        grid={f"learning rate {rate}": {"model.optim.learning_rate": rate} for rate in RATES},
        criterion="reward",
        data=partial(files, work / "world", own),
        measure=measure,
    )


def files(world: Path, own: Own, arm: Arm, seed: int) -> Options:
    """The model, prompts and completions of a run, made if they are not there; those of the YAML come first."""
    squash, offline = arm.facts.get("squash", "tanh"), arm.facts.get("offline")
    model = own.model or str(world / squash)
    if own.model is None and not (world / squash / "about.json").exists():
        in_child(partial(build, world / squash, squash))
    contexts = Path(own.dataset) if own.dataset else made(world / "contexts.jsonl", write_contexts)
    place = world / f"{Path(model).name}-{contexts.stem}"
    number = offline or own.prompts
    prompts = made(place / f"prompts-{number}-{seed}.jsonl", write_prompts, contexts, number, seed)
    found: dict[str, object] = {"model.pair.model": model, "data.dataset": prompts, "data.validation_dataset": contexts}
    found["samples.seed"] = seed + APART
    if offline:
        sizes = own.completions, own.tokens
        name = "groups-{}-" + "x".join(map(str, sizes)) + "-{}.jsonl"
        drawn = made(place / name.format(number, seed), write_groups, model, prompts, *sizes, seed)
        # Only prompts are read of these, for the samples, but data of this kind has completions.
        held = made(place / name.format("all", 0), write_groups, model, contexts, *sizes, 0)
        found |= {"data.dataset": drawn, "data.validation_dataset": held}
    return found


def made(path: Path, write: Any, *arguments: object) -> Path:
    """A file, written in a process of its own if it is not there."""
    if not path.exists():
        in_child(partial(write, path, *arguments))
    return path


def measure(arm: Arm, folder: Path) -> dict[str, Any]:
    """What is read off a run: reward and KL as lit_align's samples give them, on all contexts.

    ``reward`` is the one of the run; ``without prompt`` and ``with prompt`` count the same last samples by both
    conventions, the second one the prompt and the first 9 tokens.
    """
    steps = draws(folder)
    curve = {"step": list(steps), "reward": [one["reward"]["mean"] for one in steps.values()]}
    curve["kl"] = [one["kl"]["mean"] for one in steps.values()]
    final = {name: curve[name][-1] for name in ("reward", "kl")}
    if (centre := arm.facts.get("centre")) is not None:
        rows = [([int(row["prompt"])], [int(token) for token in row["completion"].split()]) for row in samples(folder)]
        peak = Peak(centre)
        final["without prompt"] = sum(peak.of(response) for _, response in rows) / len(rows)
        final["with prompt"] = sum(peak.of(prompt + response[:9]) for prompt, response in rows) / len(rows)
    if arm.facts.get("pairs"):
        seen = series(folder, {"chosen": "train/logratio/chosen", "margin": "train/logratio_margin"})
        final["chosen"] = seen["chosen"][-1]
        final["rejected"] = seen["chosen"][-1] - seen["margin"][-1]
    return {"final": final, "curve": curve}


if __name__ == "__main__":
    sys.exit(main())
