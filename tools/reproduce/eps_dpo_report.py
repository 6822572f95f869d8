"""The tables and figures of the study of ε-DPO, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eps_dpo_arms import BETA, BETAS, EPSILON, EPSILONS, FRONTIERS, METHODS, PRECISIONS, QUANTILES, at_beta, at_epsilon
from eps_dpo_claims import WIN, at_equal, claims
from trials.claims import More, decided
from trials.figures import Picture
from trials.frontiers import steps_of
from trials.report import Report
from trials.searched import search_table
from trials.statistics import plus_minus, table

FAR = 60.0
"""Nats, beyond which a figure of paths does not look."""
AGAINST = tuple(
    f"against {other}, {kind}" for other in ("reference", "chosen") for kind in ("raw", "length-controlled")
)


def report(folder: Path) -> Report:
    """Of the JSON in a folder."""
    return Report(tables, claims, figures)


def tables(found: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    arms = found["arms"]
    parts = [
        methods(arms),
        frontier(arms),
        by_beta(found),
        epsilons(arms),
        precisions(arms),
        search_table(found["search"], f"reward - {BETA} KL"),
    ]
    return "\n\n".join(part for part in parts if part)


def _rows(arms: Mapping[str, Any], names: Sequence[str], measures: Mapping[str, int], title: str) -> str:
    """Arms that have been run, one a row, and some of their measures with their digits."""
    rows = [
        [name, *(plus_minus(arms[name]["final"].get(one), digits) for one, digits in measures.items())]
        for name in names
        if name in arms
    ]
    return f"{title}: mean ± standard error over seeds (n)\n\n{table(['', *measures], rows)}" if rows else ""


def methods(arms: Mapping[str, Any]) -> str:
    """As Tables 1 and 2; SFT is the reference, and chosen the dataset's good completion."""
    shown = _rows(
        arms, list(METHODS), {**dict.fromkeys(AGAINST, 3), "reward": 3, "kl": 2, "objective": 3, "tokens": 1}, "methods"
    )
    finals = [arms[name]["final"] for name in METHODS if name in arms]
    names = [f"SFT {name}" for name in AGAINST if finals and f"SFT {name}" in finals[0]]
    cells = [f"{name.split(', ')[1]} {plus_minus(finals[0][name])}" for name in names]
    return shown + (f"\n\nSFT itself against chosen: {', '.join(cells)}; against itself 0.5" if cells else "")


def frontier(arms: Mapping[str, Any]) -> str:
    """The points of Figure 5."""
    names = [at_beta(method, beta) for method in FRONTIERS for beta in BETAS]
    return _rows(arms, names, {"kl": 2, WIN: 3, "reward": 3, "tokens": 1}, "frontiers")


def by_beta(found: Mapping[str, Any]) -> str:
    """What the claims about equal KL average over β: ε-DPO's win rate less another method's at each."""
    _, arms = claims(found)
    rows = []
    for other in FRONTIERS:
        pairs = [More("", at_equal(other), [at_beta(EPSILON, beta)], [at_beta(other, beta)]) for beta in BETAS]
        sides = [decided(pair, arms) for pair in pairs]
        cells = [f"{one['difference']:+.3f} ± {one['error']:.3f}" if one.get("error") else "–" for one in sides]
        if other != EPSILON and set(cells) != {"–"}:
            rows.append([other, *cells])
    title = f"win rate of {EPSILON} less that of another method at equal KL: mean ± standard error over seeds"
    return f"{title}\n\n{table(['', *(f'β {beta:g}' for beta in BETAS)], rows)}" if rows else ""


def epsilons(arms: Mapping[str, Any]) -> str:
    """What ε does."""
    measures = {"kl": 2, "+1, float32": 3, "-1, float32": 3, "margin of +1 pairs": 2, "margin of -1 pairs": 2}
    return _rows(
        arms, [at_epsilon(one) for one in EPSILONS], measures, "decisions on training pairs at the end, margins in nats"
    )


def precisions(arms: Mapping[str, Any]) -> str:
    """Ties of the same policies by precision."""
    measures = {f"{what}, {name}": 3 for name in PRECISIONS for what in ("ties", "not monotone")}
    return _rows(arms, [at_epsilon(one) for one in EPSILONS], measures, "decisions that leave β as it is, by precision")


def figures(found: Mapping[str, Any], folder: Path) -> None:
    """All figures that there are runs for."""
    arms = found["arms"]
    picture = Picture(["win rate against the reference", "reward"])
    for method in FRONTIERS:
        finals = [arms[name]["final"] for beta in BETAS if (name := at_beta(method, beta)) in arms]
        finals.sort(key=lambda final: final["kl"]["mean"])
        for i, name in enumerate((WIN, "reward")):
            picture.points(i, method, [final["kl"]["mean"] for final in finals], [final[name] for final in finals])
    picture.save(folder / "eps_dpo_figure5.png", "KL(policy ‖ reference), nats", "")
    names = ("share of steps +1", "share of steps -1", "KL(reference ‖ policy), nats", "β")
    picture = Picture(names)
    for epsilon in EPSILONS:
        curve = arms.get(at_epsilon(epsilon), {}).get("curve")
        for i, name in enumerate(("up", "down", "forward kl", "beta")):
            picture.line(i, f"ε {epsilon:g}", curve, "step", name)
    picture.save(folder / "eps_dpo_figure3.png", "optimizer step", "")
    _margins(arms, folder / "eps_dpo_figure4.png")
    _paths(arms, folder / "eps_dpo_paths.png")


def _margins(arms: Mapping[str, Any], path: Path) -> None:
    """Margins of monotone pairs by direction."""
    there = [one for one in EPSILONS if "margin of +1 pairs" in arms.get(at_epsilon(one), {}).get("final", {})]
    picture = Picture([f"{EPSILON}, ε {one:g}" for one in there] or [""])
    for i, one in enumerate(there):
        final = arms[at_epsilon(one)]["final"]
        for sign in (sign for sign in ("+1", "-1") if f"margin of {sign} pairs" in final):
            picture.points(i, sign, list(QUANTILES), [final[f"{sign} quantile {q}"] for q in QUANTILES])
    picture.save(path, "quantile of the pairs of a direction", "margin, nats")


def _paths(arms: Mapping[str, Any], path: Path) -> None:
    """Win rate against KL over training, at each β."""
    picture = Picture([f"β {beta:g}" for beta in BETAS])
    for i, beta in enumerate(BETAS):
        for method in FRONTIERS:
            final = arms.get(at_beta(method, beta), {}).get("final", {})
            steps = steps_of(final)
            kls = [final[f"kl at {step}"]["mean"] for step in steps]
            picture.points(i, method, kls, [final[f"win at {step}"] for step in steps])
        picture.panels[i].set_xlim(0, FAR)
    picture.save(path, "KL(policy ‖ reference), nats", "win rate against the reference")
