"""SPO against DPO: tables, claims and figures, from the study's JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_arms import ALPHA, ALPHAS, BETA, BETAS, DPO_BASE, DPO_BETA, DPO_BETAS, GAMMAS, SPO_BASE, arms, dpo, spo
from trials.claims import Claim, More
from trials.figures import Picture
from trials.report import Report
from trials.searched import search_table
from trials.statistics import plus_minus, table

SPO_GRID = list(dict.fromkeys([*(spo(a, BETA).name for a in ALPHAS), *(spo(ALPHA, b).name for b in BETAS)]))
DPO_GRID = [dpo(beta).name for beta in DPO_BETAS]
BARE = spo(ALPHA, 0.0).name
SOFT = {gamma: f"{SPO_BASE}, γ {gamma}" for gamma in GAMMAS}
MEASURES = ("peak", "peak at", "width", "late", "fall", "over the run", "kl at peak", "kl", "reward", "length")
HEADS = ("peak", "its step", "width", "late", "fall", "mean", "KL at peak", "KL at end", "reward", "tokens")


def report(folder: Path) -> Report:
    """Of the JSON in a folder."""
    return Report(tables, lambda found: (claims(), found["arms"]), figures)


def claims() -> list[Claim]:
    """What the study is to decide; of the grids, the mean of their arms seed by seed."""
    sides = (("at the settings of the search", [SPO_BASE], [DPO_BASE]), ("over both grids", SPO_GRID, DPO_GRID))
    found: list[Claim] = []
    for where, ours, theirs in sides:
        found.append(More(f"SPO's peak is above DPO's, {where}", "peak", ours, theirs))
        found.append(More(f"SPO's peak is wider, {where}", "width", ours, theirs))
        found.append(More(f"SPO's win rate is above DPO's late, {where}", "late", ours, theirs))
        found.append(More(f"DPO's win rate falls more from its peak than SPO's, {where}", "fall", theirs, ours))
    found.append(More("the regularizer keeps SPO nearer to the reference", "kl", [BARE], [SPO_BASE]))
    found.append(More("the regularizer keeps SPO's win rate up late", "late", [SPO_BASE], [BARE]))
    for gamma, name in SOFT.items():
        found.append(
            More(f"SoftImportance, γ {gamma}, makes SPO's win rate better", "over the run", [name], [SPO_BASE])
        )
    return found


def tables(found: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    return f"{results(found)}\n\n{search_table(found['search'], 'mean win rate over the run')}"


def results(found: Mapping[str, Any]) -> str:
    """Of each arm the shape of its win rate."""
    rows = []
    for arm in arms():
        if (one := found["arms"].get(arm.name)) is not None:
            values = [plus_minus(one["final"][name], 2) for name in MEASURES]
            rows.append([arm.name, *values, f"{one['cpu_seconds']['mean']:.0f}"])
    title = "Win rate against the reference: mean ± standard error over seeds (n)"
    return f"{title}\n\n{table(['', *HEADS, 'CPU seconds'], rows)}"


def figures(found: Mapping[str, Any], folder: Path) -> None:
    """All figures that there are runs for."""
    runs = found["arms"]
    panels = {
        f"SPO over α, β {BETA}": [spo(alpha, BETA).name for alpha in ALPHAS],
        f"SPO over β, α {ALPHA}": [spo(ALPHA, beta).name for beta in BETAS],
        "DPO over β": DPO_GRID,
    }
    for x, label in (("step", "updates"), ("kl", "KL, nats")):
        _draw(runs, panels, x, label, folder / f"spo_win_{x}.png")
    _draw(runs, {"SPO and DPO": [SPO_BASE, DPO_BASE]}, "step", "updates", folder / "spo_dpo.png")
    parts = {"the regularizer": [SPO_BASE, BARE], "SoftImportance": [SPO_BASE, *SOFT.values()]}
    if any(name in runs for name in (BARE, *SOFT.values())):
        _draw(runs, parts, "step", "updates", folder / "spo_parts.png")
    _shapes(runs, folder / "spo_shape.png")


def _draw(runs: Mapping[str, Any], panels: Mapping[str, list[str]], x: str, label: str, path: Path) -> None:
    picture = Picture(list(panels))
    for panel, names in enumerate(panels.values()):
        for name in names:
            picture.line(panel, name, runs[name]["curve"] if name in runs else None, x, "win")
        picture.panels[panel].axhline(0.5, color="gray", linewidth=0.8)
    picture.save(path, label, "win rate against the reference")


def _shapes(runs: Mapping[str, Any], path: Path) -> None:
    """Peak, late performance and width against the hyperparameter."""
    lines = {
        f"SPO, α at β {BETA}": {alpha: spo(alpha, BETA).name for alpha in ALPHAS},
        f"SPO, β at α {ALPHA}": {beta: spo(ALPHA, beta).name for beta in BETAS},
        f"DPO, β (usual: {DPO_BETA})": {beta: dpo(beta).name for beta in DPO_BETAS},
    }
    picture = Picture(["peak", "late", "width"])
    for panel, measure in enumerate(("peak", "late", "width")):
        for label, names in lines.items():
            there = {value: runs[name]["final"][measure] for value, name in names.items() if name in runs}
            picture.points(panel, label, list(there), list(there.values()))
        picture.panels[panel].set_xscale("log")
    picture.save(path, "hyperparameter", "win rate | share of draws")
