"""What controlled sentiment is to decide, from its JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trials.claims import Alike, Claim, More, Undecided
from trials.frontiers import at, height, paths_of, shared
from trials.statistics import summary

ABOVE = (
    ("EXO-rw, K 4", "DPO-rw, K 4"),
    ("EXO-rw, K 8", "DPO-rw, K 8"),
    ("EXO-rw, K 8", "EXO-rw, K 4"),
    ("EXO-pref", "DPO"),
    ("EXO-rw, K 4", "EXO-pref"),
    ("EXO-rw, K 4", "PPO"),
)
"""Whose frontier is said to lie above whose."""
BEST = "EXO-rw, K 4"
"""The one that is held against best of N."""
CLOSE = 0.05
"""Of a reward in [-1, 1]: a difference that is too small to matter, set before any run."""


def claims(found: Mapping[str, Any], about: Mapping[str, Any]) -> tuple[list[Claim], dict[str, Any]]:
    """The claims, and the arms with the measures they are about."""
    arms = {name: {**arm, "final": dict(arm["final"])} for name, arm in found["arms"].items()}
    made = [frontier(arms, *sides) for sides in ABOVE]
    return [*made, best_of_n(arms, about), *of_the_optimum(), *of_the_sweep(), *of_the_tables()], arms


def frontier(arms: dict[str, Any], above: str, below: str) -> Claim:
    """Whether one frontier lies above another where both have been measured."""
    text, measure = f"{above} has more reward than {below} at equal KL", f"mean reward ({above}; {below})"
    if {above, below} <= set(arms):
        paths = {name: paths_of(arms[name]["final"]) for name in (above, below)}
        between = shared([path for some in paths.values() for path in some])
        if between is None:
            return Undecided(f"{text}: they share no KL", measure)
        text += ", {:.1f} to {:.1f} nats".format(*between)
        for name, some in paths.items():
            arms[name]["final"][measure] = summary([height(path, *between) for path in some])
    return More(text, measure, [above], [below])


def best_of_n(arms: dict[str, Any], about: Mapping[str, Any]) -> Claim:
    """Against the best of the largest N whose KL has been measured of every seed; its errors are over prompts."""
    text, measure = f"{BEST} has more reward than best of N at equal KL", "reward at the KL of best of N"
    if BEST in arms:
        paths = paths_of(arms[BEST]["final"])
        near, far = shared(paths) or (math.inf, 0.0)
        known = [one for one in about["best of N"] if near <= one["kl"] <= far]
        if not known:
            return Undecided(f"{text}: they share no KL", measure)
        one = known[-1]
        text = text.replace("best of N", f"best of {one['N']}")
        arms[BEST]["final"][measure] = summary([at(path, one["kl"]) for path in paths])
        arms["best of N"] = {"final": {measure: summary(one["rewards"])}}
    return More(text, measure, [BEST], ["best of N"])


def of_the_optimum() -> list[Claim]:
    """Which divergence from the optimal policy each of the two makes small."""
    found: list[Claim] = []
    for k in (4, 8):
        exo, dpo = f"EXO-rw, K {k}", f"DPO-rw, K {k}"
        nearer = f"{exo} has the larger reward - β KL than DPO-rw: it is nearer the optimum by the reverse KL"
        found.append(More(nearer, "objective", [exo], [dpo]))
        mild = f"{exo}, mild", f"{dpo}, mild"
        found.append(
            More(f"K {k}, β 0.3: DPO-rw has the larger reverse KL to the optimum", "reverse", mild[1:], mild[:1])
        )
        found.append(
            More(f"K {k}, β 0.3: EXO-rw has the larger forward KL to the optimum", "forward", mild[:1], mild[1:])
        )
    return found


def of_the_sweep() -> list[Claim]:
    """What β_r, β_π and their product do."""
    one, other = ["product 0.333 0.03"], ["product 0.03 0.333"]
    return [
        More("a smaller β_r goes further from the reference", "kl", ["beta_r 0.1 0.03"], ["beta_r 0.1 0.333"]),
        More("a smaller β_π goes further from the reference", "kl", ["beta_pi 0.03 0.1"], ["beta_pi 0.333 0.1"]),
        More("a smaller β_r gives more reward", "reward", ["beta_r 0.1 0.03"], ["beta_r 0.1 0.333"]),
        More("a smaller β_π gives more reward", "reward", ["beta_pi 0.03 0.1"], ["beta_pi 0.333 0.1"]),
        Alike(f"at a fixed product the reward is the same to within {CLOSE}", "reward", one, other, CLOSE),
    ]


def of_the_tables() -> list[Claim]:
    """Win rates, by the reward model and by the oracle."""
    found: list[Claim] = []
    sides = (("EXO-pref", "DPO"), *((f"EXO-rw, {_RM}", f"{other}, {_RM}") for other in ("DPO-rw", "PPO")))
    for one, other in sides:
        for second in ("reference", "chosen"):
            for judge in ("reward model", "oracle"):
                text = f"{one} beats {second} more often than {other} does, by the {judge}"
                found.append(More(text, f"against {second}, {judge}", [one], [other]))
    return found


_RM = "reward model"
