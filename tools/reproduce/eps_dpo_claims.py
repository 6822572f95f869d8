"""What the study of ε-DPO is to decide, from its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from eps_dpo_arms import BETAS, EPSILON, EPSILONS, FRONTIERS, METHODS, PRECISIONS, at_beta, at_epsilon
from trials.claims import Alike, Claim, More, Undecided
from trials.frontiers import height, paths_of, shared
from trials.statistics import summary

WIN = "against reference, raw"
FEW = 0.01
"""A share of ties that is nearly none, set before any run."""


def claims(found: Mapping[str, Any]) -> tuple[list[Claim], dict[str, Any]]:
    """The claims, and the arms with the measures they are about."""
    arms = {name: {**arm, "final": dict(arm["final"])} for name, arm in found["arms"].items()}
    made = [frontier(arms, other) for other in FRONTIERS if other != EPSILON]
    return [*made, *of_ties(arms), *of_epsilons(), *of_directions(arms), *of_the_table()], arms


def frontier(arms: dict[str, Any], other: str) -> Claim:
    """Whether ε-DPO wins more than another method as far from the reference, at the same β, over all β."""
    measure, text = f"mean win rate ({EPSILON}; {other})", f"{EPSILON} wins more than {other} at equal β and KL"
    sides: dict[str, list[list[float]]] = {EPSILON: [], other: []}
    told = []
    for beta in BETAS:
        names = {method: at_beta(method, beta) for method in sides}
        if not set(names.values()) <= set(arms):
            return More(text, measure, [f"frontier of {EPSILON}"], [f"frontier of {other}"])
        paths = {method: paths_of(arms[name]["final"], "win") for method, name in names.items()}
        if (between := shared([path for some in paths.values() for path in some])) is not None:
            told.append("{:g}: {:.1f} to {:.1f}".format(beta, *between))
            for method, some in paths.items():
                sides[method].append([height(path, *between) for path in some])
                arms[names[method]]["final"][at_equal(other)] = summary(sides[method][-1])
    if not told:
        return Undecided(f"{text}: they share no KL", measure)
    for method, heights in sides.items():
        of_method = arms.setdefault(f"frontier of {method}", {"final": {}})
        # Where a run has failed, by their order and as many as there are at every β.
        of_method["final"][measure] = summary([fmean(seed) for seed in zip(*heights, strict=False)])
    text += f" (nats by β, {', '.join(told)})"
    return More(text, measure, [f"frontier of {EPSILON}"], [f"frontier of {other}"])


def at_equal(other: str) -> str:
    """The measure of two methods at one β: the mean win rate over the KLs that ε-DPO and another share."""
    return f"win rate at equal KL ({other})"


def of_ties(arms: dict[str, Any]) -> list[Claim]:
    """How many decisions are ties in which precision."""
    if EPSILON in arms and f"ties, {PRECISIONS[0]}" in arms[EPSILON]["final"]:
        final = arms[EPSILON]["final"]
        for name in PRECISIONS:
            arms[f"{EPSILON} in {name}"] = {"final": {"ties": final[f"ties, {name}"]}}
        arms["no ties"] = {"final": {"ties": summary([0.0] * final["kl"]["n"])}}
    full, *less = (f"{EPSILON} in {name}" for name in PRECISIONS)
    found: list[Claim] = [
        More(f"{one.split(' in ')[1]} give more ties than float32", "ties", [one], [full]) for one in less
    ]
    return [
        *found,
        Alike(f"in float32 fewer than {FEW:.0%} of the decisions are ties", "ties", [full], ["no ties"], FEW),
    ]


def of_epsilons() -> list[Claim]:
    """What a larger ε does."""
    small, *_, large = (at_epsilon(epsilon) for epsilon in EPSILONS)
    return [
        More("a larger ε goes further from the reference, KL(policy ‖ reference)", "kl", [large], [small]),
        More("a larger ε goes further from the reference, KL(reference ‖ policy)", "last forward kl", [large], [small]),
        More("a larger ε ends at a smaller β", "last beta", [small], [large]),
    ]


def of_directions(arms: dict[str, Any]) -> list[Claim]:
    """Which pairs have the larger margin."""
    for epsilon in EPSILONS:
        final = arms.get(at_epsilon(epsilon), {}).get("final", {})
        for sign in ("+1", "-1"):
            if f"margin of {sign} pairs" in final:
                arms[f"{sign} at {epsilon}"] = {"final": {"margin": final[f"margin of {sign} pairs"]}}
    return [
        More(f"pairs of +1 have the larger margin, ε {one:g}", "margin", [f"+1 at {one}"], [f"-1 at {one}"])
        for one in EPSILONS
    ]


def of_the_table() -> list[Claim]:
    """ε-DPO against every other method."""
    kinds = {"raw": "", "length-controlled": " and at equal length"}
    return [
        More(
            f"{EPSILON} beats the reference more often than {other} does, whatever their KL{said}",
            f"against reference, {kind}",
            [EPSILON],
            [other],
        )
        for kind, said in kinds.items()
        for other in METHODS
        if other != EPSILON
    ]
