from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.objectives.beta_dpo import BetaDPO, batch_beta, gumbel, keep_probability
from lit_align.objectives.dpo import DPO, dpo_loss
from lit_align.settings import OptimSettings, PairSettings
from tests.families import save_tiny
from tests.objectives.contract import ObjectiveContract, random_groups, train
from tests.test_module import KeepState


class TestBetaDPO(ObjectiveContract):
    """Its selection and β_b belong to the micro-batch: the cut is tested with both off, the running state with all."""

    objective = BetaDPO

    def loss(self, logratio: Tensor) -> Tensor:
        beta = batch_beta(torch.tensor(4.0), torch.tensor(1.5), beta=0.1, a=0.6)  # 0.1 (1 + 0.6 · 2.5) = 0.25
        return dpo_loss(logratio, beta.to(logratio.dtype))

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [1.0, 1.0], math.log(2)
        yield [4 * math.log(3), 0.0], pytest.approx(math.log(4 / 3), rel=1e-6)  # type: ignore[misc]

    def test_worked_values(self) -> None:
        for logratio, expected in self.worked():
            assert self.loss(torch.tensor([logratio], dtype=torch.float64)).item() == expected

    def build(self, model: str) -> AlignModule:
        optim = OptimSettings(learning_rate=1e-3, warmup=0.0, schedule="constant")
        return BetaDPO(a=0.0, keep=1.0, pair=PairSettings(model), optim=optim)


def test_without_guidance_it_is_dpo(tmp_path: Path) -> None:
    model, groups = save_tiny("llama", tmp_path), random_groups(8, 2)
    optim = OptimSettings(learning_rate=1e-2, warmup=0.0, schedule="constant")
    plain = train(DPO(beta=0.3, pair=PairSettings(model), optim=optim), groups, [4, 4], 1)
    ours = train(BetaDPO(beta=0.3, a=0.0, keep=1.0, pair=PairSettings(model), optim=optim), groups, [4, 4], 1)
    for (name, p), (_, q) in zip(plain.pair.named_parameters(), ours.pair.named_parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(p, q, msg=name, atol=1e-6, rtol=1e-5)


def test_a_batch_below_the_running_mean_never_falls_under_the_least_beta() -> None:
    assert batch_beta(torch.tensor(-50.0), torch.tensor(0.0), beta=0.1, a=0.6).item() == pytest.approx(1e-3)


def test_pairs_near_the_running_mean_are_likelier_to_stay() -> None:
    gap = torch.tensor([1.0, 3.0, -1.0, 5.0])
    found = keep_probability(gap, torch.tensor(1.0), torch.tensor(2.0))
    assert found.tolist() == pytest.approx([1.0, math.exp(-0.5), math.exp(-0.5), math.exp(-2)])
    assert keep_probability(gap, torch.tensor(1.0), torch.tensor(0.0)).tolist() == [1.0] * 4


def test_running_moments_follow_all_pairs_of_each_optimizer_step(tmp_path: Path) -> None:
    optim = OptimSettings(learning_rate=1e-2, warmup=0.0, schedule="constant")
    module = BetaDPO(pair=PairSettings(save_tiny("llama", tmp_path)), optim=optim)
    gaps: list[list[float]] = []
    original = module.loss

    def watched(batch):  # type: ignore[no-untyped-def]
        loss = original(batch)
        logratio = module._scores.logratio.detach().double()  # type: ignore[union-attr]
        gaps.append((logratio[:, 0] - logratio[:, 1]).tolist())
        assert loss.weight.sum() == max(1, round(0.8 * len(batch.row)))
        return loss

    module.loss = watched  # type: ignore[method-assign]
    train(module, random_groups(22, 2), [5, 3, 8, 6], 2)
    mean = square = share = 0.0
    for step in (gaps[0] + gaps[1], gaps[2] + gaps[3]):
        mean = 0.9 * mean + 0.1 * sum(step) / len(step)
        square = 0.9 * square + 0.1 * sum(g * g for g in step) / len(step)
        share = 0.9 * share + 0.1
    found_mean, found_deviation = module.moments()
    assert found_mean.item() == pytest.approx(mean / share)
    assert found_deviation.item() == pytest.approx(math.sqrt(square / share - (mean / share) ** 2))


def test_pairs_are_drawn_without_replacement_in_proportion_to_their_chance() -> None:
    """Of weights 1, 3 and 4 two: the probabilities of each first and then each second draw, by hand."""
    weights = torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64)
    kept, draws = torch.zeros(3), 4000
    for draw in range(draws):
        keys = weights.log() + torch.tensor([gumbel(f"{draw} {pair}") for pair in range(3)])
        kept[keys.topk(2).indices] += 1
    # P(kept) = 1 - P(it is left): left are 0, 1, 2 with 3/8 · 4/5 + 4/8 · 3/4 = 0.675 and so on.
    expected = 1 - torch.tensor(
        [3 / 8 * 4 / 5 + 4 / 8 * 3 / 4, 1 / 8 * 4 / 7 + 4 / 8 * 1 / 4, 1 / 8 * 3 / 7 + 3 / 8 / 5]
    )
    assert (kept / draws - expected).abs().max() < 0.03  # four standard errors


def started(tmp_path: Path) -> BetaDPO:
    module = BetaDPO(keep=0.5, pair=PairSettings(save_tiny("llama", tmp_path)))
    module.configure_model()
    return module


def test_what_is_kept_follows_the_pair_and_not_its_place_or_padding(tmp_path: Path) -> None:
    module, groups = started(tmp_path), random_groups(12, 2)
    weight = torch.linspace(0.1, 1, 12, dtype=torch.float64)
    kept = module._select(weight, groups)
    assert kept.sum() == 6
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    assert torch.equal(module._select(weight[order], groups.rows(order)), kept[order])
    padding = (1, 4)
    wider = groups._replace(
        completion_ids=torch.nn.functional.pad(groups.completion_ids, padding, value=6),
        completion_mask=torch.nn.functional.pad(groups.completion_mask, padding),
    )
    assert torch.equal(module._select(weight, wider), kept)
    module.step_gap.update(weight)  # the next micro-batch draws anew
    assert not torch.equal(module._select(weight, groups), kept)


def test_a_pair_that_is_not_finite_does_not_end_the_run(tmp_path: Path) -> None:
    """The step is then skipped, as with any other objective; the pair itself is the last to be kept."""
    weight = torch.full((4,), 0.5, dtype=torch.float64)
    weight[2] = torch.nan
    assert started(tmp_path)._select(weight, random_groups(4, 2)).tolist()[2] is False


def test_micro_batches_that_lose_no_pair_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = BetaDPO(keep=0.8, pair=PairSettings(save_tiny("llama", tmp_path)))
    for _ in range(2):
        assert module._select(torch.ones(2, dtype=torch.float64), random_groups(2, 2)).all()
    assert caplog.text.count("drops none of a micro-batch of 2 pairs") == 1


def test_two_ranks_keep_what_one_would(tmp_path: Path) -> None:
    """Micro-batches of two ranks, of unequal size, against the same pairs on one: three steps, with selection and β."""
    model, groups = save_tiny("llama", tmp_path), random_groups(24, 2)
    optim = OptimSettings(learning_rate=1e-2, warmup=0.0, schedule="constant")
    states = []
    for sizes, ranks in (([8, 8, 8], {}), ([5, 3, 2, 6, 4, 4], {"strategy": "ddp_fork", "devices": 2})):
        module = BetaDPO(keep=0.5, pair=PairSettings(model), optim=optim)
        train(module, groups, sizes, 1, callbacks=[KeepState(tmp_path / "state")], **ranks)
        states.append(torch.load(tmp_path / "state"))
    one, two = states
    assert one.keys() == two.keys() >= {"running", "corrected"}
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("name", "value"), [("beta", 0.0), ("a", -1.0), ("keep", 0.0), ("keep", 1.5), ("momentum", 1.0)]
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}"):
        BetaDPO(**{name: value})
