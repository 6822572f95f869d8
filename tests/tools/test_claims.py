"""The rule by which the studies decide their claims, and the plan they print, by hand."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

STUDIES = Path(__file__).parents[2] / "tools" / "reproduce"


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """The modules."""
    sys.path.insert(0, str(STUDIES))
    from trials import claims, plan, statistics, study

    yield SimpleNamespace(claims=claims, plan=plan, statistics=statistics, study=study)
    sys.path.remove(str(STUDIES))


@pytest.fixture
def arms(tool: Any) -> dict[str, Any]:
    """Three seeds each.

    near: 1, 2, 3 has mean 2 and error 1/√3; far: 5, 6, 7 mean 6, error 1/√3; their difference 4 ± √(2/3) = 0.816.
    wide: -3, 2, 7 has mean 2, sd 5, error 5/√3.
    """
    values = {"near": [1.0, 2.0, 3.0], "far": [5.0, 6.0, 7.0], "wide": [-3.0, 2.0, 7.0], "one": [6.0]}
    return {
        name: {"final": {"reward": tool.statistics.summary(some)}, "seconds": tool.statistics.summary(some)}
        for name, some in values.items()
    }


def test_a_difference_of_more_than_two_standard_errors_decides(tool: Any, arms: dict[str, Any]) -> None:
    found = tool.claims.decided(tool.claims.More("far has more", "reward", ["far"], ["near"]), arms)
    assert found["difference"] == pytest.approx(4.0)
    assert found["error"] == pytest.approx(math.sqrt(2 / 3))
    assert found["verdict"] == "holds"
    turned = tool.claims.decided(tool.claims.More("near has more", "reward", ["near"], ["far"]), arms)
    assert (turned["difference"], turned["verdict"]) == (pytest.approx(-4.0), "does not hold")


def test_less_than_two_standard_errors_decide_nothing(tool: Any, arms: dict[str, Any]) -> None:
    """4 ± √(1/3 + 25/3) = 2.944, of which two are 5.888."""
    found = tool.claims.decided(tool.claims.More("far has more", "reward", ["far"], ["wide"]), arms)
    assert found["error"] == pytest.approx(math.sqrt(26 / 3))
    assert found["verdict"] == "cannot tell"


@pytest.mark.parametrize(
    ("margin", "verdict"), [(2.3, "holds"), (2.4, "cannot tell"), (5.6, "cannot tell"), (5.7, "does not hold")]
)
def test_a_margin_is_passed_by_two_standard_errors(
    tool: Any, arms: dict[str, Any], margin: float, verdict: str
) -> None:
    """4 ± 0.816: the verdict turns at 4 - 1.633 = 2.367 and at 4 + 1.633 = 5.633."""
    claim = tool.claims.More("by a margin", "reward", ["far"], ["near"], margin)
    assert tool.claims.decided(claim, arms)["verdict"] == verdict


@pytest.mark.parametrize(
    ("one", "other", "margin", "verdict"),
    [
        ("near", "near", 1.7, "holds"),  # 0 + 1.633 < 1.7
        ("near", "near", 1.6, "cannot tell"),  # equal means alone show nothing
        ("near", "far", 2.3, "does not hold"),  # 4 - 1.633 > 2.3
        ("far", "near", 2.3, "does not hold"),
        ("near", "far", 2.4, "cannot tell"),
        ("far", "near", 5.7, "holds"),
    ],
)
def test_alike_is_less_than_a_margin_by_two_standard_errors(
    tool: Any, arms: dict[str, Any], one: str, other: str, margin: float, verdict: str
) -> None:
    claim = tool.claims.Alike("alike", "reward", [one], [other], margin)
    assert tool.claims.decided(claim, arms)["verdict"] == verdict


def test_a_side_of_several_arms_is_their_mean_seed_by_seed(tool: Any, arms: dict[str, Any]) -> None:
    """near and far: 3, 4, 5; with a single seed of one arm, one seed of their mean."""
    claim = tool.claims.More("both", "reward", ["near", "far"], ["near"])
    assert tool.claims.decided(claim, arms)["one"]["values"] == [3.0, 4.0, 5.0]
    single = tool.claims.More("both", "reward", ["near", "one"], ["near"])
    found = tool.claims.decided(single, arms)
    assert found["one"]["values"] == [3.5]
    assert (found["error"], found["verdict"]) == (None, "cannot tell")


def test_what_has_not_been_run_is_said(tool: Any, arms: dict[str, Any]) -> None:
    claims = [
        tool.claims.More("a", "reward", ["far"], ["absent"]),
        tool.claims.More("b", "another", ["far"], ["near"]),
        tool.claims.More("c", "seconds", ["far"], ["near"]),
        tool.claims.More("d", "reward", ["far"], ["near"]),
    ]
    verdicts = [tool.claims.decided(claim, arms)["verdict"] for claim in claims]
    assert verdicts == ["not run", "not run", "holds", "holds"]
    text = tool.claims.claims_table(claims, arms, 2)
    row = "| d | reward | 6.00 ± 0.58 (3) | 2.00 ± 0.58 (3) | +4.00 ± 0.82 | **holds** |"
    assert row in text.splitlines()
    assert "For 2 of 4 claims an arm has not been run." in text
    assert "| a |" not in text


def test_equal_seeds_that_never_differ_are_no_difference(tool: Any) -> None:
    same = {name: {"final": {"x": tool.statistics.summary([2.0, 2.0])}} for name in ("a", "b")}
    assert tool.claims.decided(tool.claims.More("more", "x", ["a"], ["b"]), same)["verdict"] == "cannot tell"


def test_the_plan_counts_runs_of_search_and_report(tool: Any, tmp_path: Path) -> None:
    """Two arms, one of which searches 3 settings on 2 seeds: 6 runs, and 2 × 4: 14 runs of 60 s on 2 workers, 7 min."""
    arms = [tool.study.Arm("one", "table"), tool.study.Arm("two", "figure", like="one")]
    study = tool.study.Study("any", tmp_path, arms, {label: {} for label in "abc"}, "x", lambda *_: {}, lambda *_: {})
    given = Namespace(parts=[], search_seeds=2, seeds=4, workers=2)
    text = tool.plan.plan(study, given, 60.0)
    assert "search: 6 runs" in text
    assert "report: 8 runs" in text
    assert "about 7 min" in text
