"""The command line that all studies have."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from trials.report import Report
from trials.results import Results, write_json
from trials.study import Conduct, Study
from trials.workers import import_all


def parse(arguments: list[str] | None, about: str | None, name: str, config: Path) -> argparse.Namespace:
    """Read a study's command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, default=config, help="a YAML file of lit_align: model, data and trainer of every run")
    add("--out", type=Path, default=Path("runs/reproduce") / name, help=f"folder for {name}.json and the figures")
    add("--work", type=Path, help="folder for the runs and their results; OUT/work without it")
    add("--parts", nargs="+", default=[], help="run only these tables and figures")
    add("--seeds", type=int, default=3, help="runs of each arm that are reported; a table may have more")
    add("--search_seeds", type=int, default=1, help="runs of each setting in the search")
    add("--workers", type=int, default=2, help="runs at a time")
    add("--keep", action="store_true", help="keep the run folders, which take a megabyte each")
    add("--quick", action="store_true", help="a few steps of a few runs of two seeds, to see that everything works")
    add("--figures", action="store_true", help="run nothing: print the tables and draw the figures from the JSON")
    given = parser.parse_args(arguments)
    for least in ("seeds", "search_seeds", "workers"):
        if getattr(given, least) < 1:
            parser.error(f"--{least} must be 1 or more")
    given.work = given.work or given.out / "work"
    given.seeds = min(given.seeds, 2) if given.quick else given.seeds
    return given


def conduct(
    given: argparse.Namespace,
    study: Study,
    report: Report,
) -> int:
    """Run a study, or what is left of it, and write its JSON and figures.

    Args:
        given: From ``parse``.
        study: Which.
        report: How to tell its results.

    Returns:
        The exit code: 1 if a run failed, other than one of a search, where a learning rate may be too large.
    """
    place = given.out / f"{study.name}.json"
    if not given.figures:
        arms = study.chosen_parts(given.parts)
        begin, one = time.monotonic(), Results(given.work / "results.json")
        # A copy, so that editing the YAML does not change the runs of a study that is going on.
        given.work.mkdir(parents=True, exist_ok=True)
        study = replace(study, config=Path(shutil.copy(study.config, given.work / "config.yaml")))
        import_all(study.config)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the runs on its way
        running = Conduct(study, one, given.work / "runs", given.seeds, given.search_seeds, given.workers)
        running.all(arms)
        done = running.done()  # also by other starts, of other parts
        write_json(place, running.report([arm for arm in study.arms if arm in arms or arm in done]))
        if not given.keep and not running.failed:
            shutil.rmtree(given.work / "runs", ignore_errors=True)
        print(f"{place}, after {(time.monotonic() - begin) / 60:.1f} min of {given.workers} workers\n")
    found = json.loads(place.read_text(encoding="utf-8"))
    print(report.text(found))
    report.figures(found, given.out)
    for name, failure in found["failed"].items():
        print(f"FAILED: {name}: {failure['problem']}\n  {failure['command']}\n  log: {failure['log']}", file=sys.stderr)
    return int(any(failure["stage"] != "search" for failure in found["failed"].values()))
