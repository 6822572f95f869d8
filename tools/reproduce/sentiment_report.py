"""The tables and figures of controlled sentiment, from its JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sentiment_arms import BETA_PI, BETA_R, METHODS, RATIO, SIZES
from sentiment_claims import claims
from trials.figures import Picture
from trials.report import Report
from trials.searched import search_table
from trials.statistics import plus_minus, table

JUDGED = ("DPO", "EXO-pref", "PPO, reward model", "DPO-rw, reward model", "EXO-rw, reward model")
COMPARED = tuple(
    f"against {other}, {judge}" for judge in ("reward model", "oracle") for other in ("reference", "chosen")
)
MIDDLE = "EXO-rw, K 4"


def report(folder: Path) -> Report:
    """Of the JSON in a folder, which also has best of N."""
    about = json.loads((folder / "sentiment_reference.json").read_text(encoding="utf-8"))
    return Report(partial(tables, about), lambda found: claims(found, about), partial(figures, about))


def tables(about: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    parts = [methods(found["arms"]), best(about), win_rates(found["arms"]), sweep(found["arms"]), ratios(found["arms"])]
    parts.append(search_table(found["search"], "reward - β KL"))
    return "\n\n".join(part for part in parts if part)


def _rows(arms: Mapping[str, Any], names: Mapping[str, str], measures: Mapping[str, int], title: str) -> str:
    """Arms that have been run, one a row, and some of their measures with their digits."""
    there = {name: said for name, said in names.items() if name in arms}
    rows = [
        [said, *(plus_minus(arms[name]["final"].get(one), digits) for one, digits in measures.items())]
        for name, said in there.items()
    ]
    return f"{title}: mean ± standard error over seeds (n)\n\n{table(['', *measures], rows)}" if rows else ""


def methods(arms: Mapping[str, Any]) -> str:
    """Where every method ends."""
    measures = {"reward": 3, "positive": 3, "kl": 2, "objective": 3, "spread": 3, "tokens": 1}
    return _rows(arms, {name: name for name in METHODS}, measures, "at the last step")


def best(about: Mapping[str, Any]) -> str:
    """Best of N."""
    rows = [
        [one["N"], *(plus_minus(one[name]) for name in ("reward", "positive")), f"{one['kl']:.2f}"]
        for one in about["best of N"]
    ]
    return f"best of N: mean ± standard error over prompts (n)\n\n{table(['N', 'reward', 'positive', 'kl'], rows)}"


def win_rates(arms: Mapping[str, Any]) -> str:
    """As Tables 1 and 2; chosen is the best of some answers, so that SFT itself wins less than half."""
    shown = _rows(arms, {name: name for name in JUDGED}, dict.fromkeys(COMPARED, 3), "win rates")
    sft = [arms[name]["final"] for name in JUDGED if name in arms]
    cells = [f"{judge} {plus_minus(one)}" for judge in ("reward model", "oracle") for one in [_sft(sft, judge)] if one]
    return shown + (f"\n\nSFT itself against chosen: {', '.join(cells)}" if cells else "")


def _sft(finals: list[Mapping[str, Any]], judge: str) -> Mapping[str, Any] | None:
    return next((final[name] for final in finals for name in [f"SFT against chosen, {judge}"] if name in final), None)


def places(arms: Mapping[str, Any]) -> dict[str, dict[float, str]]:
    """What is swept, to the factor by which it is, to the arm; at a fixed product it is β_r's."""
    found: dict[str, dict[float, str]] = {"beta_r": {}, "beta_pi": {}, "product": {}}
    for name in arms:
        what, *values = name.split()
        if what in found:
            beta_pi, beta_r = map(float, values)
            found[what][beta_pi / BETA_PI if what == "beta_pi" else beta_r / BETA_R] = name
    return {
        what: dict(sorted({**some, 1.0: MIDDLE}.items())) for what, some in found.items() if some and MIDDLE in arms
    }


def sweep(arms: Mapping[str, Any]) -> str:
    """As Table 5."""
    names = {name: name for name in arms if name.split()[0] in ("beta_r", "beta_pi", "product")}
    if names:
        names[MIDDLE] = f"all three {BETA_PI} {BETA_R}"
    return _rows(arms, names, {"reward": 3, "positive": 3, "kl": 2}, "EXO-rw, K 4 by β_π and β_r")


def ratios(arms: Mapping[str, Any]) -> str:
    """Distances from the optimum."""
    measures = {"reverse": 3, "forward": 3, "policy share": 3, "optimal share": 3, "objective": 3}
    return _rows(arms, {name: name for name in arms if name.endswith("mild")}, measures, "nats from the optimum, β 0.3")


def figures(about: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """All figures that there are runs for."""
    arms = found["arms"]
    curves = {name: arms[name]["curve"] for name in METHODS if name in arms}
    best_of = {name: [one[name]["mean"] for one in about["best of N"]] for name in ("reward", "positive")}
    best_of["kl"] = [one["kl"] for one in about["best of N"]]
    if curves:
        picture = Picture(["reward", "share of positive answers"])
        for i, what in enumerate(("reward", "positive")):
            for name, curve in {**curves, "best of N": best_of}.items():
                picture.line(i, name, curve, "kl", what)
        picture.save(folder / "sentiment_frontier.png", "KL to the reference, nats", "")
        picture = Picture(["reward", "standard deviation of the reward", "KL, nats"])
        for i, what in enumerate(("reward", "spread", "kl")):
            for name, curve in curves.items():
                picture.line(i, name, curve, "step", what)
        picture.save(folder / "sentiment_steps.png", "optimizer step", "")
    _sweep(arms, folder / "sentiment_sweep.png")
    _ratios(arms, folder / "sentiment_ratio.png")


def _sweep(arms: Mapping[str, Any], path: Path) -> None:
    """As Figure 6."""
    picture = Picture(["reward", "KL, nats", "share of positive answers"])
    for what, some in places(arms).items():
        for i, name in enumerate(("reward", "kl", "positive")):
            picture.points(i, what, list(some), [arms[arm]["final"][name] for arm in some.values()])
    for axes in picture.panels:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks([RATIO, 1, 1 / RATIO], [f"{RATIO:.2g}", "1", f"{1 / RATIO:.2g}"])
    picture.save(path, "times 0.1", "")


def _ratios(arms: Mapping[str, Any], path: Path) -> None:
    """As Figures 3, 7 and 8: over the reward, since its one axis orders all answers."""
    picture = Picture([f"{what}, K {k}" for k in SIZES for what in ("density of the reward", "ratio to the reference")])
    for i, k in enumerate(SIZES):
        for name in ("EXO-rw", "DPO-rw"):
            curve = arms.get(f"{name}, K {k}, mild", {}).get("curve")
            if curve is not None and name == "EXO-rw":
                picture.line(2 * i, "reference", curve, "step", "reference")
                picture.line(2 * i, "optimal", curve, "step", "optimal")
                picture.line(2 * i + 1, "optimal", curve, "step", "optimal ratio")
            picture.line(2 * i, name, curve, "step", "policy")
            picture.line(2 * i + 1, name, curve, "step", "policy ratio")
    picture.save(path, "reward", "")
