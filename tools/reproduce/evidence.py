"""Write the tables of docs/evidence.md anew from the studies' JSON beside it.

    python tools/reproduce/evidence.py

Between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->`` the page is written by this: ``studies``, the command lines,
``claims``, one table of all claims with their verdicts, and the tables of each study under its name. The rest of it is
written by hand. A test compares the page with what this writes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from trials.claims import FAILS, HEAD, HOLDS, MISSING, OPEN, claim_row, decided
from trials.report import Report
from trials.statistics import table

DOCS = Path(__file__).parents[2] / "docs"
STUDIES = {
    "bandit": "The bandit",
    "length": "The length tasks",
    "sentiment": "Controlled sentiment",
    "spo": "SPO against DPO",
    "eps_dpo": "ε-DPO",
}
"""The files of the studies to their names, in the page's order."""
OPTIONS = dict.fromkeys(("sentiment", "eps_dpo"), "--search_seeds 2 ")
"""Of the command lines that the results are from, beside their folders."""
VERDICTS = (HOLDS, FAILS, OPEN, MISSING)


def main() -> int:
    page = DOCS / "evidence.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), blocks(DOCS / "evidence")), encoding="utf-8")
    return 0


def filled(text: str, written: Mapping[str, str]) -> str:
    """The page with its blocks written anew.

    Raises:
        ValueError: If the page has no place for one of them.
    """
    for name, block in written.items():
        place = re.compile(rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"no place for {name}: <!-- begin: {name} --> and <!-- end: {name} -->")
        text = place.sub(lambda found, block=block: f"{found[1]}\n{block}\n\n{found[2]}", text)
    return text


def blocks(folder: Path) -> dict[str, str]:
    """What is written into the page, by name; of a study without a JSON that it has not been run."""
    there = [name for name in STUDIES if (folder / f"{name}.json").exists()]
    told = {name: (import_module(f"{name}_report").report(folder), read(folder / f"{name}.json")) for name in there}
    tables = {name: report.tables(found) for name, (report, found) in told.items()}
    return {"studies": commands(told), "claims": verdicts(told), **dict.fromkeys(STUDIES, "Not run yet."), **tables}


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def commands(told: Mapping[str, tuple[Report, Any]]) -> str:
    """How to run each study, and what its runs took."""
    rows = []
    for name in STUDIES:
        line = f"`python tools/reproduce/{name}.py {OPTIONS.get(name, '')}--out docs/evidence --work runs/{name}`"
        total = told[name][1]["total"] if name in told else None
        took = ["–", "–"] if total is None else [total["runs"], f"{total['cpu_seconds'] / 3600:.1f}"]
        rows.append([link(name), line, *took])
    return table(["study", "command", "runs", "hours of one core to train them"], rows)


def verdicts(told: Mapping[str, tuple[Report, Any]]) -> str:
    """How many claims of each study hold, and each of them."""
    numbers: dict[str, Counter[str]] = {}
    rows: list[list[str]] = []
    for name, (report, found) in told.items():
        claims, arms = report.claims(found)
        all_of_them = [decided(claim, arms) for claim in claims]
        numbers[name] = Counter(one["verdict"] for one in all_of_them)
        rows.append([f"**{STUDIES[name]}**", *[""] * (len(HEAD) - 1)])
        rows += [claim_row(one, report.digits) for one in all_of_them]
    counts = [[link(name), *(number[verdict] for verdict in VERDICTS)] for name, number in numbers.items()]
    totals = [sum(number[verdict] for number in numbers.values()) for verdict in VERDICTS]
    return f"{table(['number of claims', *VERDICTS], [*counts, ['all', *totals]])}\n\n{table(HEAD, rows)}"


def link(name: str) -> str:
    """The title of a study, which leads to its part of the page."""
    title = STUDIES[name]
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    return f"[{title}](#{anchor})"


if __name__ == "__main__":
    sys.exit(main())
