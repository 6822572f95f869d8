"""ε-DPO after arXiv 2502.13177: Figures 3, 4 and 5, Tables 1 and 2.

    python tools/reproduce/eps_dpo.py --search_seeds 2 --out docs/evidence --work runs/eps_dpo    everything
    python tools/reproduce/eps_dpo.py --out runs/eps_dpo --parts table     the table of methods alone
    python tools/reproduce/eps_dpo.py --figures --out docs/evidence                  tables and figures anew

Every run is ``python -m lit_align fit`` on ``eps_dpo.yaml`` and then ``python -m lit_align evaluate`` on held-out
prompts: reward, KL(policy ‖ reference), win rates against the reference and the dataset's chosen, raw and
length-controlled. The KL of Figure 3 is the other one, KL(reference ‖ policy), on the training completions, which the
reference has written. All methods see as many completions in as many steps, and each tries the same learning rates, on
a seed that is not reported, and takes the one of the largest reward - 0.01 KL; ``eps_dpo_arms.py`` has the other
settings.
"""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml
from eps_dpo_arms import BETA, arms, quick, seconds
from eps_dpo_report import report
from trials.after import answer, evaluation, standing
from trials.command import conduct, parse
from trials.plan import plan
from trials.results import series
from trials.study import SEARCH_SEED, Arm, Study
from trials.trial import Options
from trials.wins import win_curve

RATES = ("0.0003", "0.001", "0.003", "0.01", "0.03")
SHOWN = {
    "beta": "beta",
    "up": "steps_up",
    "down": "steps_down",
    "forward kl": "forward_kl",
    "margin": "logratio_margin",
}
"""Our names to the logged ones."""


@dataclass(frozen=True)
class Own:
    """What the study's YAML says, and how much is asked of a run.

    Attributes:
        dataset: Rows whose validation split has the prompts.
        prompts: How many of these.
        tokens: Budget of an answer.
        reward: See ``python -m lit_align evaluate``; None is the dataset's own.
        pairs: Training pairs on which decisions are looked at.
        every: Steps between two points of a path.
    """

    dataset: str
    prompts: int
    tokens: int
    reward: str | None
    pairs: int = 128
    every: int = 4

    @classmethod
    def read(cls, config: Path) -> Own:
        """From the YAML."""
        text = yaml.safe_load(config.read_text(encoding="utf-8"))
        data, samples = text["data"]["init_args"], text["samples"]
        reward = data.get("reward")
        name = reward["init_args"]["path"] if isinstance(reward, dict) else reward
        return cls(data["dataset"], samples["prompts"], samples["max_new_tokens"], name)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments, __doc__, "eps_dpo", Path(__file__).parent / "eps_dpo.yaml")
    own = Own.read(given.config)
    own = replace(own, prompts=4, tokens=12, pairs=6, every=2) if given.quick else own
    study = Study(
        name="eps_dpo",
        config=given.config,
        arms=arms(),
        grid={f"learning rate {rate}": {"model.optim.learning_rate": rate} for rate in RATES},
        criterion="objective",
        data=partial(drawing, own),
        measure=partial(measure, own),
    )
    study = quick(study) if given.quick else study
    if not given.figures:
        chosen = study.chosen_parts(given.parts)
        print(plan(study, given, statistics.fmean(map(seconds, chosen))), flush=True)
    return conduct(given, study, report(given.out))


def drawing(own: Own, arm: Arm, seed: int) -> Options:
    """Samples while it learns, of which the paths of the frontiers are made; two of a prompt, as ``win_rate`` wants."""
    if not arm.facts.get("path") or seed >= SEARCH_SEED:
        return {"samples.prompts": 0}
    return {"samples.prompts": own.prompts // 2, "samples.completions": 2, "samples.every_n_steps": own.every}


def measure(own: Own, arm: Arm, folder: Path) -> dict[str, Any]:
    """What is read off a run, and what is asked of it afterwards."""
    seed = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["seed_everything"]
    options: dict[str, object] = {"dataset": own.dataset, "prompts": own.prompts, "max_new_tokens": own.tokens}
    options |= {"seed": seed} | ({"reward": own.reward} if own.reward else {})
    found = evaluation(folder, "judged", options)
    final = {name: value["mean"] for name, value in found["candidates"]["policy"].items()}
    final["objective"] = final["reward"] - BETA * final["kl"]
    for first, said in (("policy", ""), ("reference", "SFT ")):
        for second in ("reference", "chosen"):
            rates = standing(found, first, second)
            final |= {f"{said}against {second}, {kind}": rate for kind, rate in rates.items()}
    if arm.facts.get("path") and seed < SEARCH_SEED:
        path = win_curve(folder)
        final |= {
            f"{name} at {step:.0f}": path[name][i] for i, step in enumerate(path["step"]) for name in ("kl", "win")
        }
    epsilon = arm.facts.get("epsilon")
    if epsilon is None or seed >= SEARCH_SEED:
        return {"final": final, "curve": {"step": []}}
    from eps_dpo_pairs import decisions

    final |= answer(folder, "decisions", partial(decisions, folder, epsilon, own.pairs))
    curve = series(folder, {name: f"train/{logged}" for name, logged in SHOWN.items()})
    final |= {f"last {name}": values[-1] for name, values in curve.items()}
    return {"final": final, "curve": curve}


if __name__ == "__main__":
    sys.exit(main())
