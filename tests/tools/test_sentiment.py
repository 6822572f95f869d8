"""Controlled sentiment: densities and divergences by importance sampling, frontiers, claims; and all of it once."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
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


def test_a_reward_model_that_was_stopped_is_trained_anew_and_other_settings_have_another_world(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "own.yaml"
    config.write_text((STUDIES / "sentiment.yaml").read_text())
    own, calls = tool.world.Own.read(config), []
    world = tmp_path / own.world
    (world / "reward_model" / "adapter").mkdir(parents=True)
    (world / "reward_model" / "adapter" / "reward.json").touch()
    (world / "groups.jsonl").touch()

    def train(call: Any) -> None:
        assert not (world / "reward_model").exists()  # or the run would not begin
        (world / "reward_model").mkdir()
        calls.append(call)

    monkeypatch.setattr(tool.world, "in_child", train)
    for _ in range(2):
        tool.world.reward_model(world, own)
    assert len(calls) == 1
    config.write_text(config.read_text() + "# another\n")
    assert own.world != world.name
    assert replace(own, rows=7).world != own.world


def test_divergences_by_hand(tool: Any) -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4): KL(q ‖ p) = ¾ ln 3/2 + ¼ ln 1/2, and the other way; 1/Σq² = 8/5 of 2."""
    found = tool.ratio.divergences(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]))
    assert found["forward"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found["log Z"] == pytest.approx(math.log(2))
    assert (found["policy share"], found["optimal share"]) == pytest.approx((1.0, 0.8))


def test_what_is_constant_over_a_prompt_changes_nothing(tool: Any) -> None:
    one, two = torch.randn(3, 5, generator=torch.manual_seed(0)), torch.randn(3, 5, generator=torch.manual_seed(1))
    moved = tool.ratio.divergences(one + torch.tensor([[1.0], [-2.0], [30.0]]), two - 4)
    plain = tool.ratio.divergences(one, two)
    assert moved.pop("log Z") == pytest.approx(plain.pop("log Z") - 4, abs=1e-5)  # Z has the reward's own unit
    assert moved == pytest.approx(plain, abs=1e-5)
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


def test_rewards_at_equal_kl_are_read_off_along_the_root_of_kl_where_a_path_first_comes_there(tool: Any) -> None:
    """0 to 4 nats is 0 to 2 in the root, so that 1 nat is half way; 9 nats is 3, and 6.25 is 2.5."""
    path = [(0.0, 0.0), (4.0, 2.0), (1.0, 9.0), (9.0, 8.0)]
    assert tool.frontiers.at(path, 0) == 0
    assert tool.frontiers.at(path, 1.0) == 1.0
    assert tool.frontiers.at(path[:2] + path[3:], 6.25) == 5.0
    assert tool.frontiers.at(path, 9.0) == 8.0
    assert tool.frontiers.height([(0.0, 0.0), (9.0, 3.0)], 1.0, 4.0, places=2) == pytest.approx((1 + 2) / 2)
    near, far = 0.48, 6.8
    assert near + (far - near) > far  # in floating point
    tool.frontiers.height([(0.0, 0.0), (far, 3.0)], near, far)
    with pytest.raises(ValueError, match="9 nats"):
        tool.frontiers.at(path, 9.1)


def test_paths_are_compared_where_all_have_been_measured(tool: Any) -> None:
    """From the later first point to the earlier last one; what lies below is a guess for one of them."""
    slow, fast = [(0.0, 0.0), (1.0, 1.0), (5.0, 2.0)], [(0.0, 0.0), (3.0, 1.0), (2.0, 1.0), (9.0, 2.0)]
    assert tool.frontiers.shared([slow, fast]) == (3.0, 5.0)
    assert tool.frontiers.shared([slow, [(0.0, 0.0), (6.0, 1.0)]]) is None


def test_the_reverse_divergence_from_the_optimum_is_what_its_definition_says(tool: Any) -> None:
    """Answers of probability ½ with r/β = log 3 and 0: π* is (¾, ¼), and the reference has reward β log(3)/2, no KL."""
    beta, reward = 0.5, 0.5 * math.log(3) / 2
    log_z = tool.ratio.divergences(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]))["log Z"]
    assert log_z - reward / beta == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))


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


def arm(*points: tuple[float, float]) -> dict[str, Any]:
    """A path from (0, 0) through some (KL, reward), of three seeds that differ by a tenth in reward."""
    final = {}
    for step, (kl, reward) in enumerate([(0.0, 0.0), *points]):
        final |= {f"kl at {4 * step}": summed(*[kl] * 3)}
        final |= {f"reward at {4 * step}": summed(reward, reward + 0.1, reward - 0.1)}
    return {"final": final, "curve": {"step": []}}


def test_a_frontier_lies_above_another_at_equal_kl_and_not_at_its_end(tool: Any) -> None:
    """√KL and √KL / 2; the second goes further and ends higher. Both have been measured from 1 to 2.25 nats."""
    arms = {"EXO-rw, K 4": arm((1.0, 1.0), (2.25, 1.5)), "DPO-rw, K 4": arm((0.81, 0.45), (25.0, 2.5))}
    best = [{"N": n, "kl": kl, "rewards": [0.1, 0.2]} for n, kl in ((1, 0.0), (2, 0.2), (4, 1.44), (8, 3.0))]
    made, measured = tool.claims.claims({"arms": arms}, {"best of N": best})
    verdicts = {found["text"]: found for claim in made for found in [tool.decided(claim, measured)]}
    above = verdicts["EXO-rw, K 4 has more reward than DPO-rw, K 4 at equal KL, 1.0 to 2.2 nats"]
    assert above["verdict"] == "holds"
    assert above["difference"] == pytest.approx(sum(math.sqrt(1 + 1.25 * i / 7) / 2 for i in range(8)) / 8)
    chosen = next(one for text, one in verdicts.items() if "best of 4" in text)  # 8 would be further than EXO came
    assert chosen["one"]["mean"] == pytest.approx(1.2)
    assert verdicts["a smaller β_r gives more reward"]["verdict"] == "not run"


def test_frontiers_that_have_not_been_measured_together_are_not_compared(tool: Any) -> None:
    arms = {"EXO-rw, K 4": arm((5.0, 1.0), (6.0, 1.0)), "DPO-rw, K 4": arm((1.0, 1.0), (2.0, 2.0))}
    made, measured = tool.claims.claims({"arms": arms}, {"best of N": [{"N": 1, "kl": 0.0, "rewards": [0.1, 0.2]}]})
    apart = [one for claim in made for one in [tool.decided(claim, measured)] if "share no KL" in one["text"]]
    assert [one["verdict"] for one in apart] == ["cannot tell"] * 2  # best of N as well


def test_what_is_swept_stands_at_its_factor(tool: Any) -> None:
    own = tool.world.Own.read(STUDIES / "sentiment.yaml")
    found = tool.report.places({one.name: {} for one in tool.arms.arms(own)})
    for some in found.values():
        assert list(some) == pytest.approx([0.3, 1.0, 1 / 0.3], rel=1e-2)


def test_the_study_runs_from_end_to_end_and_redraws(quick_study: Callable[..., str], tmp_path: Path) -> None:
    quick_study("sentiment", "--seeds", "1")
    arms = json.loads((tmp_path / "sentiment.json").read_text())["arms"]
    assert set(arms) == {"EXO-rw, K 4", "EXO-rw, reward model", "EXO-rw, K 4, mild"}
    kls = arms["EXO-rw, K 4"]["curve"]["kl"]
    assert kls[0] == 0 < kls[-1]
    rates = [arms["EXO-rw, reward model"]["final"][f"against reference, {by}"] for by in ("reward model", "oracle")]
    assert all(0 <= rate["mean"] <= 1 for rate in rates)
    assert arms["EXO-rw, K 4, mild"]["final"]["forward"]["mean"] > 0
    for name in ("frontier", "steps", "ratio"):
        assert (tmp_path / f"sentiment_{name}.png").stat().st_size > 1000
