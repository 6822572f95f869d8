"""The README's table of objectives says what is there: every class, every YAML, nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from lit_align import objectives
from lit_align.module import AlignModule

ROOT = Path(__file__).parent.parent
ROWS = re.findall(r"^\| `(\w+)` \|(.*)\| (.*) \|(.*)\| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_each_objective_has_one_row() -> None:
    assert sorted(row[0] for row in ROWS) == sorted(objectives.__all__)


def test_each_yaml_stands_in_the_row_of_its_objective() -> None:
    named = {name: row[0] for row in ROWS for name in re.findall(r"`([\w.]+\.yaml)`", row[4])}
    shipped = {
        path.name: yaml.safe_load(path.read_text())["model"]["class_path"] for path in (ROOT / "configs").glob("*.yaml")
    }
    assert named == shipped


def test_each_row_says_whether_reference_and_rewards_are_needed() -> None:
    for name, _, _, needs, _ in ROWS:
        objective: type[AlignModule] = getattr(objectives, name)
        source = Path(ROOT / "lit_align" / "objectives" / f"{objective.__module__.rsplit('.', 1)[1]}.py").read_text()
        body = source[source.index(f"class {name}(") :].split("\nclass ")[0]
        calls = re.findall(r"self\.(?:pair\.)?score\(([^()]*)\)", body)
        reads_reference = any("reference=False" not in call for call in calls)
        assert ("reference" in needs) == reads_reference, name
        assert ("reward" in needs or "label" in needs) == objective.needs_reward, name


def test_no_placeholder_is_left() -> None:
    assert "@@" not in (ROOT / "README.md").read_text()
