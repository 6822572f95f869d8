"""The study of ε-DPO: decisions in each precision, margins by direction, its arms and claims; and all of it once."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_align.batch import CompletionBatch
from lit_align.pair import PolicyReferencePair
from lit_align.settings import PairSettings

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "tools" / "reproduce"


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """The modules of the study."""
    sys.path.insert(0, str(STUDIES))
    import eps_dpo_arms
    import eps_dpo_claims
    import eps_dpo_pairs
    from trials import claims

    yield SimpleNamespace(arms=eps_dpo_arms, claims=eps_dpo_claims, pairs=eps_dpo_pairs, decided=claims.decided)
    sys.path.remove(str(STUDIES))


def moved(dtype: str) -> PolicyReferencePair:
    """The stories with an adapter that does something, the same in each precision."""
    pair = PolicyReferencePair(PairSettings("stories", dtype=dtype)).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pair.policy.named_parameters():
        if "lora_" in name:  # A as well, which else begins where the tests before have left the random numbers
            parameter.copy_((0.01 if "lora_B" in name else 0.05) * torch.randn(parameter.shape, generator=generator))
    return pair


def pairs_of_tokens() -> CompletionBatch:
    """12 pairs of random tokens and of many lengths, prompts padded on the right."""
    generator = torch.Generator().manual_seed(1)

    def some(*shape: int) -> torch.Tensor:
        return torch.randint(5, 4000, shape, generator=generator)

    lengths = torch.randint(1, 20, (12, 2, 1), generator=generator)
    asked = torch.arange(6) < torch.randint(1, 7, (12, 1), generator=generator)
    return CompletionBatch(
        some(12, 6),
        asked,
        some(12, 2, 20),
        torch.arange(20) < lengths,
        None,
        asked[:, :1].expand(-1, 2),
        torch.arange(12),
    )


def test_rows_of_their_own_give_the_changes_that_the_scorer_gives(tool: Any) -> None:
    """Two programs that share no code: trees, chunks and mixtures of the sweep, and plain logits of padded rows."""
    pair, batch = moved("float32"), pairs_of_tokens()
    with torch.no_grad():
        scored = tool.pairs.scored_changes(pair.score(batch, epsilon=0.02))
        plain = tool.pairs.rounded_changes(pair, batch, 0.02, torch.float32)
    assert scored.abs().min() > 1e-5
    torch.testing.assert_close(plain, scored, atol=2e-4, rtol=1e-3)


def test_sums_of_sixteen_bits_make_ties(tool: Any) -> None:
    """Log-probs of a hundred nats in 8 bits of mantissa are half a nat apart, far more than ε of anything here."""
    batch = pairs_of_tokens()
    with torch.no_grad():
        exact = tool.pairs.rounded_changes(moved("float32"), batch, 0.01, torch.float32)
        logits = tool.pairs.rounded_changes(moved("bfloat16"), batch, 0.01, torch.float32)
        rounded = tool.pairs.rounded_changes(moved("bfloat16"), batch, 0.01, torch.bfloat16)
    assert tool.pairs.shares(exact, "x")["ties, x"] == 0
    assert tool.pairs.shares(logits, "x")["ties, x"] < 0.1  # what is summed in float32 hardly ever comes out the same
    assert tool.pairs.shares(rounded, "x")["ties, x"] > 0.25


def test_shares_of_decisions_by_hand(tool: Any) -> None:
    changes = torch.tensor([[1.0, 2.0], [-1.0, -3.0], [1.0, -1.0], [0.0, 1.0], [0.0, 0.0]])
    found = tool.pairs.shares(changes, "x")
    assert found == pytest.approx({"+1, x": 0.2, "-1, x": 0.2, "not monotone, x": 0.2, "ties, x": 0.4})


def test_margins_are_those_of_each_direction(tool: Any) -> None:
    steps, gaps = torch.tensor([1, 1, -1, 0, 1]), torch.tensor([1.0, 2.0, -5.0, 99.0, 6.0])
    found = tool.pairs.margins(steps, gaps)
    assert (found["margin of +1 pairs"], found["margin of -1 pairs"]) == (3.0, -5.0)
    assert found["+1 quantile 0.5"] == 2.0
    assert not any("-1" in name for name in tool.pairs.margins(steps.abs(), gaps))


def test_every_method_sees_as_many_completions_and_takes_a_rate_that_was_searched(tool: Any) -> None:
    arms = {arm.name: arm for arm in tool.arms.arms()}
    assert len(arms) == len(tool.arms.arms())
    sizes = {"UnpairedData": 1, None: 2}
    for arm in arms.values():
        assert arm.like is None or arms[arm.like].like is None
        size = 4 if arm.options.get("data.select") == "ranked" else sizes[arm.options.get("data")]
        assert arm.options.get("data.batch_size", 16) * size == 32
    for method in tool.arms.FRONTIERS:
        betas = [arms[tool.arms.at_beta(method, beta)].options["model.beta"] for beta in tool.arms.BETAS]
        assert betas == list(tool.arms.BETAS)
    epsilons = [arms[tool.arms.at_epsilon(one)].options["model.epsilon"] for one in tool.arms.EPSILONS]
    assert epsilons == list(tool.arms.EPSILONS)


def test_frontiers_are_compared_at_equal_beta_and_kl(tool: Any) -> None:
    """At each β one wins ½ + √KL/10 at 0, 1 and 4 nats, the other ½ + √KL/20 at 0, 2 and 8; both are known from 2 to 4.

    At the largest β the second goes no further than 1 nat, and they are not compared there.
    """

    def summed(*values: float) -> dict[str, Any]:
        return {"mean": values[0], "standard_error": 0.0, "n": len(values), "values": list(values)}

    arms: dict[str, Any] = {}
    for method, slope, kls in ((tool.arms.EPSILON, 0.1, (0.0, 1.0, 4.0)), ("DPO", 0.05, (0.0, 2.0, 8.0))):
        for beta in tool.arms.BETAS:
            far = kls if (method, beta) != ("DPO", 0.5) else (0.0, 0.5, 1.0)
            final = {f"kl at {4 * i}": summed(kl, kl) for i, kl in enumerate(far)}
            final |= {f"win at {4 * i}": summed(*[0.5 + slope * math.sqrt(kl)] * 2) for i, kl in enumerate(far)}
            arms[tool.arms.at_beta(method, beta)] = {"final": final}
    made, measured = tool.claims.claims({"arms": arms})
    found = {one["text"]: one for claim in made for one in [tool.decided(claim, measured)]}
    against = next(one for text, one in found.items() if text.startswith("ε-DPO wins more than DPO"))
    assert against["verdict"] == "holds"
    assert against["difference"] == pytest.approx(0.05 * sum(math.sqrt(2 + 2 * i / 7) for i in range(8)) / 8)
    assert "(nats by β, 0.1: 2.0 to 4.0, 0.05: 2.0 to 4.0, 0.01: 2.0 to 4.0)" in against["text"]
    other = next(one for text, one in found.items() if text.startswith("ε-DPO wins more than β-DPO"))
    assert other["verdict"] == "not run"
    fewer = arms[tool.arms.at_beta("DPO", 0.1)]["final"]  # of which a run has failed
    fewer |= {name: summed(value["mean"]) for name, value in fewer.items()}
    made, measured = tool.claims.claims({"arms": arms})
    text = next(one["text"] for claim in made for one in [tool.decided(claim, measured)] if "than DPO" in one["text"])
    assert "0.1: 2.0 to 4.0" in text


def test_the_study_runs_from_end_to_end_and_redraws(quick_study: Callable[..., str], tmp_path: Path) -> None:
    quick_study("eps_dpo", "--seeds", "1")
    arms = json.loads((tmp_path / "eps_dpo.json").read_text())["arms"]
    assert set(arms) == {"ε-DPO", "ε-DPO, beta 0.1"}
    final, curve = arms["ε-DPO"]["final"], arms["ε-DPO"]["curve"]
    assert 0 <= final["against reference, raw"]["mean"] <= 1
    kinds = [final[f"{kind}, float32"]["mean"] for kind in ("+1", "-1", "ties", "not monotone")]
    assert sum(kinds) == pytest.approx(1)
    assert (curve["up"][0], curve["down"][0], curve["forward kl"][0]) == (
        0,
        0,
        0,
    )  # before the first step all are equal
    for name in ("figure3", "figure4", "figure5"):
        assert (tmp_path / f"eps_dpo_{name}.png").stat().st_size > 1000
