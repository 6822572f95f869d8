"""The page of evidence says what the studies' JSON says, and shows every figure that is drawn from it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "tools" / "reproduce"
FOLDER = ROOT / "docs" / "evidence"
PAGE = ROOT / "docs" / "evidence.md"


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """The modules."""
    sys.path.insert(0, str(STUDIES))
    import evidence
    from trials import claims, report, statistics

    yield SimpleNamespace(evidence=evidence, claims=claims, report=report, statistics=statistics)
    sys.path.remove(str(STUDIES))


def test_the_tables_of_the_page_are_what_the_results_say(tool: Any) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert tool.evidence.filled(text, tool.evidence.blocks(FOLDER)) == text


def test_the_page_shows_every_figure() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(evidence/([\w.]+)\)", PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(path.name for path in FOLDER.glob("*.png"))


def test_a_page_without_a_place_is_refused(tool: Any) -> None:
    text = "before\n<!-- begin: a -->\nold\n<!-- end: a -->\nafter\n"
    assert tool.evidence.filled(text, {"a": "new"}) == "before\n<!-- begin: a -->\n\nnew\n\n<!-- end: a -->\nafter\n"
    with pytest.raises(ValueError, match="no place for b"):
        tool.evidence.filled(text, {"b": "new"})


def test_verdicts_are_counted_by_study(tool: Any) -> None:
    """1 ± 0 is more than 0 ± 0 and not less; what no run has been made for is counted apart."""
    one, none = ({"final": {"x": tool.statistics.summary([value] * 3)}} for value in (1.0, 0.0))
    arms = {"one": one, "none": none}
    claims = [tool.claims.More("up", "x", ["one"], ["none"]), tool.claims.More("down", "x", ["none"], ["one"])]
    claims.append(tool.claims.More("unknown", "x", ["one"], ["absent"]))
    report = tool.report.Report(lambda found: "", lambda found: (claims, found["arms"]), lambda found, folder: None)
    text = tool.evidence.verdicts({"spo": (report, {"arms": arms})})
    assert "| [SPO against DPO](#spo-against-dpo) | 1 | 1 | 0 | 1 |" in text
    assert "| all | 1 | 1 | 0 | 1 |" in text
    assert "| up | x | 1.000 ± 0.000 (3) | 0.000 ± 0.000 (3) | +1.000 ± 0.000 | **holds** |" in text
