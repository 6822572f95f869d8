"""Controlled sentiment: densities and divergences by importance sampling, frontiers, claims; and all of it once."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "tools" / "reproduce"


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """The modules of the study."""
    sys.path.insert(0, str(STUDIES))
    import sentiment_arms
    import sentiment_claims
    import sentiment_ratio
    import sentiment_report
    import sentiment_world
    from trials import claims, frontiers

    parts = {"arms": sentiment_arms, "claims": sentiment_claims, "ratio": sentiment_ratio, "world": sentiment_world}
    yield SimpleNamespace(**parts, report=sentiment_report, frontiers=frontiers, decided=claims.decided)
    sys.path.remove(str(STUDIES))


def test_divergences_by_hand(tool: Any) -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4): KL(q ‖ p) = ¾ ln 3/2 + ¼ ln 1/2, and the other way; 1/Σq² = 8/5 of 2."""
    found = tool.ratio.divergences(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]))
    assert found["forward"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found["reverse"] == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert (found["policy share"], found["optimal share"]) == pytest.approx((1.0, 0.8))


def test_what_is_constant_over_a_prompt_changes_nothing(tool: Any) -> None:
    one, two = torch.randn(3, 5, generator=torch.manual_seed(0)), torch.randn(3, 5, generator=torch.manual_seed(1))
    moved = tool.ratio.divergences(one + torch.tensor([[1.0], [-2.0], [30.0]]), two - 4)
    assert moved == pytest.approx(tool.ratio.divergences(one, two), abs=1e-5)
    assert tool.ratio.importance(one).mean(-1).tolist() == pytest.approx([1.0] * 3)


def test_densities_integrate_to_one_and_the_optimum_tilts_them_by_its_temperature(tool: Any) -> None:
    """Standard normal rewards under exp(r/β) are normal around 1/β, so the log of the ratio at r is r/β - 1/(2β²)."""
    rewards = torch.randn(40, 500, generator=torch.manual_seed(0), dtype=torch.float64)
    places = torch.linspace(-6, 6, 601, dtype=torch.float64)
    weights = tool.ratio.importance(rewards / 2)
    for counts in (torch.ones_like(rewards), weights):
        assert torch.trapezoid(tool.ratio.density(rewards, counts, places), places).item() == pytest.approx(1, abs=1e-3)
    found = tool.ratio.curves(torch.zeros_like(rewards), rewards, beta=2.0)
    assert found["policy ratio"] == pytest.approx([1.0] * len(found["step"]))
    middle = [i for i, r in enumerate(found["step"]) if abs(r) < 1]
    for i in middle:
        expected = math.exp(found["step"][i] / 2 - 1 / 8)
        assert found["optimal ratio"][i] == pytest.approx(expected, rel=0.05)


def test_rewards_at_equal_kl_are_read_off_linearly_where_a_path_first_comes_there(tool: Any) -> None:
    path = [(0.0, 0.0), (2.0, 2.0), (1.0, 9.0), (4.0, 3.0)]
    assert tool.frontiers.at(path, 0) == 0
    assert tool.frontiers.at(path, 1.0) == 1.0
    assert tool.frontiers.at(path, 4.0) == 3.0
    assert tool.frontiers.common([path, [(0.0, 0.0), (3.0, 1.0)]]) == 3.0
    assert tool.frontiers.height(path, 2.0, places=4) == pytest.approx((0.5 + 1 + 1.5 + 2) / 4)
    with pytest.raises(ValueError, match="4 nats"):
        tool.frontiers.at(path, 4.1)


def test_every_method_sees_as_many_completions_and_takes_a_rate_that_was_searched(tool: Any) -> None:
    own = tool.world.Own.read(STUDIES / "sentiment.yaml")
    arms = {arm.name: arm for arm in tool.arms.arms(own)}
    assert len(arms) == len(tool.arms.arms(own))
    for arm in arms.values():
        assert arm.like is None or arms[arm.like].like is None
        options = arm.options
        size = 2 if options.get("data.select") == "all_pairs" else options.get("data.max_completions")
        seen = options["data.minibatch"] if "data" in options else options["data.batch_size"] * size
        assert seen == tool.arms.COMPLETIONS
    swept = [arm for arm in arms.values() if arm.name.startswith("product")]
    assert [arm.facts["beta"] for arm in swept] == pytest.approx([tool.arms.BETA] * 2)


def summed(*values: float) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "standard_error": 0.0, "n": len(values), "values": list(values)}


def arm(rewards: tuple[float, ...], kl: float) -> dict[str, Any]:
    """A path of one step from (0, 0), which each seed ends at a reward of its own."""
    final = {"reward at 0": [0.0] * len(rewards), "kl at 0": [0.0] * len(rewards), "reward at 4": list(rewards)}
    final["kl at 4"] = [kl] * len(rewards)
    return {"final": {name: summed(*values) for name, values in final.items()}, "curve": {"step": []}}


def test_a_frontier_lies_above_another_at_equal_kl_and_not_at_its_end(tool: Any) -> None:
    """Slopes 1 and 1/2; the second goes further and ends higher."""
    arms = {"EXO-rw, K 4": arm((1.0, 1.1, 0.9), 1.0), "DPO-rw, K 4": arm((2.0, 2.1, 1.9), 4.0)}
    best = [{"N": n, "kl": kl, "rewards": [0.1, 0.2]} for n, kl in ((1, 0.0), (2, 0.2), (4, 2.0))]
    made, measured = tool.claims.claims({"arms": arms}, {"checkpoints": [0, 4], "best of N": best})
    verdicts = {found["text"]: found for claim in made for found in [tool.decided(claim, measured)]}
    above = next(one for text, one in verdicts.items() if text.startswith("EXO-rw, K 4 has more reward than DPO-rw"))
    assert above["verdict"] == "holds"
    assert above["difference"] == pytest.approx((1.0 - 0.5) * (1 + 8) / 16)
    chosen = next(one for text, one in verdicts.items() if "best of 2" in text)  # 4 would be further than EXO came
    assert chosen["one"]["mean"] == pytest.approx(0.2)
    assert verdicts["a smaller β_r gives more reward"]["verdict"] == "not run"


def test_what_is_swept_stands_at_its_factor(tool: Any) -> None:
    own = tool.world.Own.read(STUDIES / "sentiment.yaml")
    found = tool.report.places({one.name: {} for one in tool.arms.arms(own)})
    for some in found.values():
        assert list(some) == pytest.approx([0.3, 1.0, 1 / 0.3], rel=1e-2)


def test_the_study_runs_from_end_to_end_and_redraws(tmp_path: Path) -> None:
    command = [sys.executable, str(STUDIES / "sentiment.py"), "--quick", "--seeds", "1", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    arms = json.loads((tmp_path / "sentiment.json").read_text())["arms"]
    assert set(arms) == {"EXO-rw, K 4", "EXO-rw, reward model", "EXO-rw, K 4, mild"}
    kls = arms["EXO-rw, K 4"]["curve"]["kl"]
    assert kls[0] == 0 < kls[-1]
    rates = [arms["EXO-rw, reward model"]["final"][f"against reference, {by}"] for by in ("reward model", "oracle")]
    assert all(0 <= rate["mean"] <= 1 for rate in rates)
    assert arms["EXO-rw, K 4, mild"]["final"]["forward"]["mean"] > 0
    assert "| best of N" not in done.stderr
    for name in ("frontier", "steps", "ratio"):
        assert (tmp_path / f"sentiment_{name}.png").stat().st_size > 1000
