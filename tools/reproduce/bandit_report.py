"""The bandit's tables and figures, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bandit_arms import CENTRES, FRESH, PASSES_T, PROMPTS, SHOWN, TIMES_B
from bandit_claims import claims
from trials.claims import Claim
from trials.figures import Picture
from trials.report import Report
from trials.searched import search_table
from trials.statistics import plus_minus, table

PRINTED = {
    "offline IPO": "0.82 ± 0.04",
    "on-policy PPO": "0.92 ± 0.01",
    "on-policy RWR": "0.88 ± 0.01",
    "on-policy IPO": "0.92 ± 0.01",
}
"""Table 3 of arXiv 2404.14367, R₁, 5 seeds; the prompt's token is averaged into the reward."""
ORDER = (*PRINTED, *(f"offline {name}" for name in SHOWN))


def report(folder: Path) -> Report:
    """Of the JSON in a folder."""

    def decided(found: Mapping[str, Any]) -> tuple[list[Claim], Mapping[str, Any]]:
        return claims() if of_the_paper(found) else [], found["arms"]

    return Report(tables, decided, figures)


def of_the_paper(found: Mapping[str, Any]) -> bool:
    """Whether its rewards are the paper's, and not one of the YAML."""
    return any(name.startswith(f"{reward} ") for name in found["arms"] for reward in CENTRES)


def tables(found: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    prefixes = [f"{name} " for name in CENTRES] if of_the_paper(found) else [""]
    parts = []
    for prefix in prefixes:
        parts += [results(found, prefix), search_table(found["search"], "reward", prefix)]
    return "\n\n".join(part for part in [*parts, variants(found)] if part)


def results(found: Mapping[str, Any], prefix: str) -> str:
    """Of each method the reward at the end, by both conventions, beside the paper's."""
    rows = []
    for name in ORDER:
        if (arm := found["arms"].get(prefix + name)) is None:
            continue
        kinds = [plus_minus(arm["final"].get(kind)) for kind in ("reward", "without prompt", "with prompt")]
        printed = PRINTED.get(name, "–") if prefix == "R1 " else "–"
        rate = arm["settings"].removeprefix("learning rate ")
        rows.append([name, *kinds, printed, plus_minus(arm["final"]["kl"], 1), rate, f"{arm['seconds']['mean']:.0f}"])
    head = ["", "reward", "prompt not counted", "prompt counted", "paper", "KL, nats", "rate", "seconds a run"]
    about = "mean ± standard error over seeds (n); the reward is the one that a run was trained on"
    return f"{prefix}{about}\n\n{table(head, rows)}" if rows else ""


def variants(found: Mapping[str, Any]) -> str:
    """Runs that count the prompt, and runs whose reference is clipped, beside their bases."""
    rows = []
    for name in PRINTED:
        for what in ("", ", prompt counted", ", clipped"):
            arm = found["arms"].get(f"R1 {name}{what}")
            if arm is not None:
                rows.append([name + what, plus_minus(arm["final"]["reward"]), plus_minus(arm["final"]["kl"], 1)])
    if not any(", " in str(row[0]) for row in rows):
        return ""
    return f"R1, other conventions\n\n{table(['', 'reward', 'KL, nats'], rows)}"


def figures(found: Mapping[str, Any], folder: Path) -> None:
    """All figures that there are runs for."""
    arms = found["arms"]
    rewards = [name for name in CENTRES if any(arm.startswith(f"{name} ") for arm in arms)] or [""]
    bases = [f"{reward} on-policy {name}".strip() for reward in rewards for name in FRESH]
    _varied(arms, bases, "B 1M", [f"B {k}M" for k in (1, *TIMES_B)], folder / "bandit_figure4.png")
    _varied(arms, bases, "T 10", [f"T {n}" for n in sorted((10, *PASSES_T))], folder / "bandit_figure14.png")
    fixed = ("offline IPO", *(f"offline {name}" for name in SHOWN))
    _compare(arms, rewards, fixed, folder / "bandit_figure16.png")
    both = ("offline IPO", "on-policy IPO", "offline RWR", "on-policy RWR")
    _compare(arms, rewards, both, folder / "bandit_figure19.png")
    _implicit(arms, folder / "bandit_figure18.png")


def _varied(arms: Mapping[str, Any], bases: list[str], own: str, labels: list[str], path: Path) -> None:
    """Reward over the run of each base, itself under the label ``own``, and of those that vary a number of it."""
    picture = Picture(bases)
    for panel, base in enumerate(bases):
        names = {label: base if label == own else f"{base}, {label}" for label in labels}
        if any(name in arms for name in names.values() if name != base):
            for label, name in names.items():
                picture.line(panel, label, _curve(arms, name), "share", "reward")
    picture.save(path, "share of the run", "reward")


def _compare(arms: Mapping[str, Any], rewards: list[str], names: tuple[str, ...], path: Path) -> None:
    """Reward over the run, and against KL."""
    kinds = ("over the run", "against KL")
    picture = Picture([f"{reward} {what}".strip() for reward in rewards for what in kinds])
    for i, reward in enumerate(rewards):
        for name in names:
            curve = _curve(arms, f"{reward} {name}".strip())
            picture.line(2 * i, name, curve, "share", "reward")
            picture.line(2 * i + 1, name, curve, "kl", "reward")
    picture.save(path, ["share of the run", "KL, nats"] * len(rewards), "reward")


def _implicit(arms: Mapping[str, Any], path: Path) -> None:
    """Log-ratios of best and worst of ten by offline IPO in its last steps, against the number of prompts."""
    names = {n: f"R1 offline IPO, {n} prompts" for n in PROMPTS} | {100: "R1 offline IPO"}
    there = {n: arms[name]["final"] for n, name in sorted(names.items()) if name in arms}
    picture = Picture(["R1 offline IPO: log-ratios of training pairs", "R1 offline IPO: reward on all contexts"])
    if len(there) > 1:
        for which in ("chosen", "rejected"):
            picture.points(0, which, list(there), [final[which] for final in there.values()])
        picture.points(1, "offline IPO", list(there), [final["reward"] for final in there.values()])
        for axes in picture.panels:
            axes.set_xscale("log")
    picture.save(path, "prompts", ["nats", "reward"])


def _curve(arms: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A curve with the share of its steps that are taken, since runs differ in these."""
    if name not in arms:
        return None
    curve = arms[name]["curve"]
    return {**curve, "share": [step / curve["step"][-1] for step in curve["step"]]}
