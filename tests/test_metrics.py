"""One contract for every metric: right over micro-batches, ranks and a restored state."""

from __future__ import annotations

import pytest
import torch
from torchmetrics import Metric

from lit_align.batch import CompletionBatch, Loss, Scores
from lit_align.metrics import (
    Divergence,
    ImplicitRewards,
    LogProbs,
    MeanLoss,
    StatMeans,
    SumMetric,
    Throughput,
    best_and_worst,
    standard_metrics,
)
from tests.objectives.contract import random_groups

Update = tuple[CompletionBatch, Scores, Loss]


def example() -> Update:
    """Four groups of up to three completions of two tokens; the third has one completion, the fourth two."""
    present = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    mask = present[..., None].expand(4, 3, 2)
    logps = -torch.arange(1.0, 25).reshape(4, 3, 2) * mask
    reference = logps + torch.tensor([0.5, -0.25]) * mask
    ids = torch.zeros(4, 3, 2, dtype=torch.int64)
    batch = CompletionBatch(ids[:, 0], mask[:, 0], ids, mask, None, present, torch.arange(4))
    scores = Scores(logps, reference, None, mask * 0.75, None, mask.sum(-1), mask * 0.25)
    implicit = torch.tensor([[3.0, 9.0, 1.0], [2.0, 0.0, 2.0], [7.0, 0.0, 0.0], [-1.0, 1.0, 0.0]])
    stats = {"beta": torch.tensor(0.2)}
    return batch, scores, Loss(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, 0.0, 2.0]), implicit, stats)


EXPECTED = {
    MeanLoss: {"loss": (1 + 2 + 2 * 4) / 4},
    # first and last present column of the groups with two or more: (3, 1), (2, 2), (-1, 1)
    ImplicitRewards: {
        "rewards/chosen": 4 / 3,
        "rewards/rejected": 4 / 3,
        "rewards/margins": 0.0,
        "rewards/accuracies": (1 + 0.5 + 0) / 3,
    },
    # columns hold -(1+2) -(3+4) -(5+6) | -(7+8) .. -(11+12) | .. | -(19+20) -(21+22)
    LogProbs: {
        "logps/chosen": -(3 + 15 + 39) / 3,
        "logps/rejected": -(11 + 23 + 43) / 3,
        "logratio/chosen": -0.25,
        "logratio_margin": 0.0,
        "lengths/chosen": 2.0,
        "lengths/rejected": 2.0,
    },
    Divergence: {"kl": 1.5, "forward_kl": 0.5},
    StatMeans: {"beta": 0.2},
}


def build(kind: type[SumMetric]) -> SumMetric:
    return StatMeans(["beta"]) if kind is StatMeans else kind()  # type: ignore[call-arg]


def rows(update: Update, chosen: list[int]) -> Update:
    batch, scores, loss = update
    return (
        CompletionBatch(*(None if f is None else f[chosen] for f in batch)),
        Scores(*(None if f is None else f[chosen] for f in scores)),
        loss._replace(
            value=loss.value[chosen], weight=loss.weight[chosen], implicit_reward=loss.implicit_reward[chosen]
        ),
    )


@pytest.fixture(params=EXPECTED, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[SumMetric]:
    return request.param


def check(metric: Metric, kind: type[SumMetric]) -> None:
    found = metric.compute()
    assert {name: pytest.approx(value.item(), abs=1e-6) for name, value in found.items()} == EXPECTED[kind]


def test_worked_values(kind: type[SumMetric]) -> None:
    metric = build(kind)
    metric.update(*example())
    check(metric, kind)


def test_micro_batches_in_any_split_and_order_give_the_same(kind: type[SumMetric]) -> None:
    for split in ([[0], [1], [2], [3]], [[3, 1], [2, 0]], [[2], [0, 1, 3]]):
        metric = build(kind)
        for part in split:
            metric.update(*rows(example(), part))
        check(metric, kind)


def test_ranks_add_up(kind: type[SumMetric]) -> None:
    """What torchmetrics does across ranks is to reduce each state as declared; here by hand for two."""
    ranks = [build(kind), build(kind)]
    for metric, part in zip(ranks, ([0, 3], [1, 2]), strict=True):
        metric.update(*rows(example(), part))
    merged = build(kind)
    for name in merged._defaults:
        assert merged._reductions[name] is not None
        stacked = torch.stack([getattr(metric, name) for metric in ranks])
        setattr(merged, name, merged._reductions[name](stacked))  # type: ignore[misc, operator]
    merged._update_count = 2
    check(merged, kind)


def test_the_state_survives_a_checkpoint(kind: type[SumMetric]) -> None:
    metric, restored = build(kind), build(kind)
    metric.update(*rows(example(), [0, 2]))
    restored.load_state_dict(metric.state_dict())
    restored.update(*rows(example(), [1, 3]))
    check(restored, kind)


def test_nothing_is_reported_where_nothing_was_seen(kind: type[SumMetric]) -> None:
    batch, scores, loss = rows(example(), [2])
    empty = loss._replace(implicit_reward=None, stats={}, weight=torch.zeros(1))
    without = Scores(scores.token_logps, None, None, None, None, scores.lengths)
    metric = build(kind)
    metric.update(batch, without, empty)
    assert metric.compute() == {}


def test_throughput_is_tokens_of_all_over_seconds_of_the_slowest() -> None:
    metric = Throughput()
    assert metric.compute() == {}
    metric.update(300, 2.0)
    metric.update(100, 2.0)
    assert metric.compute()["tokens_per_second"] == 100
    assert metric._reductions["seconds"](torch.tensor([1.0, 4.0])) == 4.0  # type: ignore[misc, operator]


def test_best_and_worst_are_the_first_and_the_last_present() -> None:
    values = torch.tensor([[5.0, 1.0, 3.0], [4.0, 2.0, 9.0], [8.0, 9.0, 9.0]])
    present = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    groups = random_groups(3, 3)._replace(present=present)
    best, worst = best_and_worst(values, groups)
    assert best.tolist() == [5.0, 4.0]
    assert worst.tolist() == [3.0, 2.0]
    # Where all rewards are equal there is no better one; what an absent column holds does not count.
    equal = groups._replace(reward=torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    best, worst = best_and_worst(values, equal)
    assert best.tolist() == [5.0]
    assert worst.tolist() == [3.0]


def test_the_standard_set_reports_every_name_once() -> None:
    metrics = standard_metrics(["beta"]).clone(prefix="train/")
    metrics.update(*example())
    assert set(metrics.compute()) == {f"train/{name}" for values in EXPECTED.values() for name in values}
