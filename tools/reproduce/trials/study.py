"""A study: arms that differ in settings, the same search for each, then runs over seeds, and what they come to."""

from __future__ import annotations

import statistics as means
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trials.results import Results
from trials.statistics import best, curve, summary
from trials.trial import Options, Trial
from trials.workers import Call, Ended, lit_align, run_all

SEARCH_SEED = 1000
"""First seed of the search; those of the report begin with 0, so that no run is both."""


@dataclass(frozen=True)
class Arm:
    """One column of a table, or one line of a figure.

    Attributes:
        name: Such as "on-policy PPO/R1".
        part: The table or figure it belongs to, to be run alone.
        options: Keys that differ from the study's config.
        like: The arm whose chosen settings it takes; None searches its own.
        facts: What the study itself has to know of it.
        least: Runs that are reported at least, however few the study is asked for.
    """

    name: str
    part: str
    options: Options = field(default_factory=dict)
    like: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    least: int = 1


@dataclass(frozen=True)
class Study:
    """What is run, and what is read off a run.

    Attributes:
        name: Of its files.
        config: A YAML file of lit_align.
        arms: All of them; a ``like`` names one that has none itself.
        grid: Label to the settings that are tried for every arm that searches.
        criterion: The name in ``measure``'s "final" that the search makes large.
        data: Further keys for an arm and a seed, such as the files it reads.
        measure: Of a run folder: "final", names to numbers, and "curve", "step" and other names to series.
    """

    name: str
    config: Path
    arms: Sequence[Arm]
    grid: Mapping[str, Options]
    criterion: str
    data: Callable[[Arm, int], Options]
    measure: Callable[[Arm, Path], Mapping[str, Any]]

    def trial(self, arm: Arm, label: str, seed: int) -> Trial:
        """The run of an arm with some settings of the grid."""
        options = {**self.data(arm, seed), **arm.options, **self.grid[label]}
        return Trial(f"{arm.name}/{label}/seed {seed}", self.config, options, seed)

    def chosen_parts(self, parts: Sequence[str]) -> list[Arm]:
        """The arms of some parts, and those whose search they take; all for no part.

        Raises:
            SystemExit: If there is no such part, with those there are.
        """
        known = list(dict.fromkeys(arm.part for arm in self.arms))
        if unknown := [part for part in parts if part not in known]:
            print(f"error: --parts {' '.join(unknown)}: there are {', '.join(known)}", file=sys.stderr)
            raise SystemExit(2)
        named = [arm for arm in self.arms if not parts or arm.part in parts]
        wanted = {arm.like for arm in named}
        return [arm for arm in self.arms if arm in named or arm.name in wanted]


@dataclass
class Conduct:
    """Runs a study as far as it is not run yet.

    Attributes:
        study: Which.
        results: What is there, and where what comes is kept.
        runs: Folder of the run folders.
        seeds: Runs of each arm that are reported, >= 1; some arms want more.
        search_seeds: Runs of each setting in the search, >= 1.
        workers: Runs at a time.
        failed: Runs that failed, name to what is to be known of them, the stage included.
    """

    study: Study
    results: Results
    runs: Path
    seeds: int
    search_seeds: int
    workers: int
    call: Call = lit_align
    failed: dict[str, dict[str, str]] = field(default_factory=dict)

    def all(self, arms: Sequence[Arm]) -> None:
        """Search, choose, report."""
        own = [arm for arm in arms if arm.like is None]
        search = range(SEARCH_SEED, SEARCH_SEED + self.search_seeds)
        self.run("search", [(arm, label, seed) for arm in own for label in self.study.grid for seed in search])
        chosen = {arm.name: label for arm in own if (label := self.choice(arm)) is not None}
        found = [(arm, chosen[arm.like or arm.name]) for arm in arms if (arm.like or arm.name) in chosen]
        self.run("report", [(arm, label, seed) for arm, label in found for seed in self.reported(arm)])

    def run(self, stage: str, wanted: Iterable[tuple[Arm, str, int]]) -> None:
        """Run what has no result yet, with a line for each run and an estimate of the time left."""
        trials = {trial.key: (arm, trial) for arm, *rest in wanted for trial in [self.study.trial(arm, *rest)]}
        waiting = {key: pair for key, pair in trials.items() if key not in self.results}
        print(f"{stage}: {len(trials)} runs, {len(trials) - len(waiting)} of them done before", flush=True)
        for ended in run_all([trial for _, trial in waiting.values()], self.runs, self.workers, self.call):
            arm, _ = waiting.pop(ended.trial.key)
            said = self.keep(stage, arm, ended)
            left = sum(self.expected(other.name) for other, _ in waiting.values()) / self.workers
            done = f"{len(trials) - len(waiting)}/{len(trials)}"
            told = f"{said}, {ended.seconds:.0f} s; {left / 60:.0f} min left"
            print(f"{stage} {done}: {ended.trial.name}: {told}", flush=True)

    def keep(self, stage: str, arm: Arm, ended: Ended) -> str:
        """Put down what a run gave, and say it in a word; a run that failed is tried again by the next start."""
        problem = f"exit code {ended.code}: {ended.last_words}" if ended.code else None
        try:
            measured = {} if problem else self.study.measure(arm, ended.folder)
        except Exception as error:
            problem = f"its results cannot be read: {error!r}"
        if problem:
            told = {"stage": stage, "problem": problem, "log": str(ended.log)}
            self.failed[ended.trial.name] = {**told, "command": ended.trial.command(ended.folder)}
            return f"FAILED, {problem}"
        seconds = {"seconds": ended.seconds, "cpu_seconds": ended.cpu_seconds}
        self.results.add(ended.trial.key, {"arm": arm.name, **seconds, **measured})
        return f"{self.study.criterion} {measured['final'][self.study.criterion]:.3f}"

    def done(self) -> list[Arm]:
        """The arms that have all their reported runs, and so has the one whose search they take."""
        begun = {one["arm"] for one in self.results.found.values()}
        # Of no other arm is there anything, and to name its runs would make the data that they read.
        there = [arm for arm in self.study.arms if {arm.name, arm.like or arm.name} <= begun]
        whole = {arm.name for arm in there if self._whole(arm)}
        return [arm for arm in there if {arm.name, arm.like or arm.name} <= whole]

    def _whole(self, arm: Arm) -> bool:
        base = next((one for one in self.study.arms if one.name == arm.like), arm)
        try:
            label = best(self.tried(base))
        except ValueError:  # no run of the search is there
            return False
        return all(self.study.trial(arm, label, seed).key in self.results for seed in self.reported(arm))

    def reported(self, arm: Arm) -> range:
        """The seeds of an arm's reported runs."""
        return range(max(self.seeds, arm.least))

    def expected(self, arm: str) -> float:
        """Seconds a run of an arm takes: the mean of its own, or else of all there are."""
        seconds = [(one["arm"] == arm, one["seconds"]) for one in self.results.found.values()]
        own = [value for same, value in seconds if same] or [value for _, value in seconds]
        return means.fmean(own) if own else 0.0

    def tried(self, arm: Arm) -> dict[str, list[float | None]]:
        """The criterion of each search run of an arm, None where it failed."""
        return {label: [self._criterion(key) for key in keys] for label, keys in self._searched(arm).items()}

    def choice(self, arm: Arm) -> str | None:
        """What the search chooses; None, which is said, where every run of it failed."""
        try:
            return best(self.tried(arm))
        except ValueError as error:
            self.failed[arm.name] = {"stage": "choice", "problem": str(error), "log": "", "command": ""}
            return None

    def report(self, arms: Sequence[Arm]) -> dict[str, Any]:
        """Everything the tables and figures need: the search, and of each arm means and curves over its seeds."""
        own = [arm for arm in arms if arm.like is None]
        search = {arm.name: {"tried": self.tried(arm), "chosen": self.choice(arm)} for arm in own}
        used = {key for arm in own for keys in self._searched(arm).values() for key in keys}
        found = {}
        for arm in arms:
            label = search[arm.like or arm.name]["chosen"]
            keys = [] if label is None else [self.study.trial(arm, label, seed).key for seed in self.reported(arm)]
            used.update(keys)
            runs = [self.results[key] for key in keys if key in self.results]
            if runs:
                found[arm.name] = {"part": arm.part, "settings": label, **over_seeds(runs)}
        seconds = [self.results[key]["cpu_seconds"] for key in used if key in self.results]
        total = {"runs": len(seconds), "cpu_seconds": sum(seconds), "search seeds": self.search_seeds}
        return {"study": self.study.name, "total": total, "search": search, "arms": found, "failed": self.failed}

    def _searched(self, arm: Arm) -> dict[str, list[str]]:
        """The keys of an arm's search runs by settings."""
        seeds = range(SEARCH_SEED, SEARCH_SEED + self.search_seeds)
        return {label: [self.study.trial(arm, label, seed).key for seed in seeds] for label in self.study.grid}

    def _criterion(self, key: str) -> float | None:
        return self.results[key]["final"][self.study.criterion] if key in self.results else None


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Runs that differ in their seed as one; what not all of them have is left out."""
    there = [name for name in runs[0]["final"] if all(name in run["final"] for run in runs)]
    final = {name: summary([run["final"][name] for run in runs]) for name in there}
    clocks = {name: summary([run[name] for run in runs]) for name in ("seconds", "cpu_seconds")}
    return {"final": final, "curve": curve([run["curve"] for run in runs]), **clocks}
