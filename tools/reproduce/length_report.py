"""The length tasks' tables, claims and figures, from their JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from length_arms import BUFFERS, FIXED, FRESH, PASSES, SWEPT, TASKS
from trials.claims import Alike, Claim, More
from trials.figures import Picture
from trials.report import Report
from trials.searched import search_table
from trials.statistics import plus_minus, table

TOKEN = 1.0
"""Rewards nearer than this, in tokens, are alike: less than the length of a word."""
MEASURES = ("gold", "gold over the run", "half", "kl at half", "kl", "proxy")
HEADS = ("true reward", "mean over the run", "update at half way", "KL there, nats", "KL, nats", "learned reward")


def report(folder: Path) -> Report:
    """Of the JSON in a folder."""
    return Report(tables, lambda found: (claims(), found["arms"]), figures, digits=2)


def claims() -> list[Claim]:
    """What the study is to decide."""
    found: list[Claim] = [claim for task in ("Min", "Skew") for claim in _of_task(task)]
    others = [name for name in (*FRESH, *FIXED) if name != "on-policy DPO"]
    found += [_alike(f"Mode: {name} ends like on-policy DPO, within a token", name) for name in others]
    return found + [claim for name in SWEPT for claim in _of_reuse(name)]


def _alike(text: str, name: str) -> Claim:
    return Alike(text, "gold", [f"Mode {name}"], ["Mode on-policy DPO"], TOKEN)


def _of_task(task: str) -> list[Claim]:
    def more(text: str, measure: str, larger: str, smaller: str) -> Claim:
        return More(f"{task}: {text}", measure, [f"{task} {larger}"], [f"{task} {smaller}"])

    over = "gold over the run"
    found = [more("on-policy DPO is half way sooner than offline DPO", "half", "offline DPO", "on-policy DPO")]
    found.append(more("on-policy DPO is better than offline DPO over the run", over, "on-policy DPO", "offline DPO"))
    found.append(more("on-policy is better without a negative gradient: best-of-N", over, "best-of-N", "Pref-FT"))
    negative = "best-of-N, negative gradient"
    found.append(more("a negative gradient is better: best-of-N with it", over, negative, "best-of-N"))
    found.append(more("a negative gradient is better: offline DPO over Pref-FT", over, "offline DPO", "Pref-FT"))
    others = ("PPO", "RWR", "REINFORCE", "best-of-N")
    found += [more(f"on-policy DPO is better than {name}", over, "on-policy DPO", name) for name in others]
    text, large = "a fresh buffer for each update beats one for all", BUFFERS[-1]
    return found + [more(f"{name}: {text}", over, name, _sweep(name, large, 1)) for name in SWEPT]


def _of_reuse(name: str) -> list[Claim]:
    once, some, much = (f"Min {_sweep(name, BUFFERS[0], passes)}" for passes in (1, *PASSES))
    few, over, T = "gold of few draws", "gold over the run", PASSES
    found: list[Claim] = [More(f"{name}: T {T[0]} gets more of as few completions than T 1", few, [some], [once])]
    if name == "PPO":
        text = f"PPO tolerates much reuse: T {T[1]} like T 1 on as many updates, within a token"
        return [*found, More(text, over, [much], [once], -TOKEN)]
    return [*found, More(f"{name}: much reuse hurts, T {T[1]} against T 1 on as many updates", over, [once], [much])]


def _sweep(name: str, times: int, passes: int) -> str:
    return f"{name}, B {times}M, T {passes}"


def tables(found: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    parts = []
    for task in TASKS:
        searched = search_table(found["search"], "mean true reward over the run", f"{task} ", digits=2)
        parts += [results(found, task), searched]
    return "\n\n".join(part for part in parts if part)


def results(found: Mapping[str, Any], task: str) -> str:
    """Every arm of a task."""
    there = {name: arm for name, arm in found["arms"].items() if name.startswith(f"{task} ")}
    if not there:
        return ""
    rows = []
    for name, arm in there.items():
        values = [plus_minus(arm["final"][measure], 2) for measure in MEASURES]
        rate = arm["settings"].removeprefix("learning rate ")
        rows.append([name.removeprefix(f"{task} "), *values, rate, f"{arm['cpu_seconds']['mean']:.0f}"])
    reward = next(iter(there.values()))["final"]["reward model"]["mean"]
    told = f"the reward model tells best from worst in {reward:.1%} of validation groups"
    title = f"{task}: mean ± standard error over seeds (n); {told}"
    return f"{title}\n\n{table(['', *HEADS, 'rate', 'CPU seconds'], rows)}"


def figures(found: Mapping[str, Any], folder: Path) -> None:
    """All figures that there are runs for."""
    arms = found["arms"]
    _tasks(arms, [*FRESH, *FIXED], "step", folder / "length_updates.png", "updates")
    _tasks(arms, [*FRESH, *FIXED], "kl", folder / "length_kl.png", "KL, nats")
    pairs = ["best-of-N", "best-of-N, negative gradient", "Pref-FT", "offline DPO"]
    _tasks(arms, pairs, "step", folder / "length_negative.png", "updates")
    _tasks(arms, [*FRESH, *FIXED], "proxy", folder / "length_proxy.png", "learned reward, standardized")
    for task in TASKS:
        _sweeps(arms, task, [(times, 1) for times in BUFFERS], "step", folder / f"length_buffers_{task}.png")
    reuse = [(BUFFERS[0], passes) for passes in (1, *PASSES)]
    for x in ("step", "drawn"):
        _sweeps(arms, "Min", reuse, x, folder / f"length_reuse_{x}.png")


def _tasks(arms: Mapping[str, Any], names: list[str], x: str, path: Path, label: str) -> None:
    tasks = [task for task in TASKS if any(f"{task} {name}" in arms for name in names)]
    if not tasks:
        return
    picture = Picture(tasks)
    for panel, task in enumerate(tasks):
        for name in names:
            picture.line(panel, name, _curve(arms, f"{task} {name}"), x, "gold")
    picture.save(path, label, "true reward, tokens")


def _sweeps(arms: Mapping[str, Any], task: str, sizes: list[tuple[int, int]], x: str, path: Path) -> None:
    names = [[name, *(_sweep(name, *size) for size in sizes)] for name in SWEPT]
    if not any(f"{task} {name}" in arms for group in names for name in group[1:]):
        return
    picture = Picture([f"{task} {name}" for name in SWEPT])
    for panel, (base, *others) in enumerate(names):
        picture.line(panel, "B 1M, T 1", _curve(arms, f"{task} {base}"), x, "gold")
        for name in others:
            picture.line(panel, name.removeprefix(f"{base}, "), _curve(arms, f"{task} {name}"), x, "gold")
    picture.save(path, "updates" if x == "step" else "completions drawn", "true reward, tokens")


def _curve(arms: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return arms[name]["curve"] if name in arms else None
