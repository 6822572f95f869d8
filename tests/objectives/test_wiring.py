"""Each module hands its own hyperparameters and the right scores to its loss, by formulas written out from scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, softplus

from lit_align import objectives
from lit_align.batch import CompletionBatch, Scores
from lit_align.checks import check_groups
from lit_align.data.collate import Group
from lit_align.data.unpaired import UnpairedData, collate_unpaired
from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.settings import PairSettings
from tests.families import save_tiny
from tests.objectives.contract import random_groups

Formula = Callable[[Scores, CompletionBatch], Tensor]


def margin(values: Tensor) -> Tensor:
    return values[:, 0] - values[:, 1]


def spo_weight(s: Scores, gamma: float) -> Tensor:
    joint = gamma * (s.logps[:, 0].exp() + s.logps[:, 1].exp()).log()
    return torch.sigmoid(joint - joint.mean())


def softmax_kl(s: Scores, b: CompletionBatch, beta: float, reward_beta: float, reverse: bool) -> Tensor:
    assert b.reward is not None
    log_p, log_q = (beta * s.logratio).log_softmax(-1), (b.reward / reward_beta).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1) if reverse else -(log_q.exp() * log_p).sum(-1)


def odds(s: Scores) -> Tensor:
    p = (s.logps / s.lengths).exp()
    return (p / (1 - p)).log()


CASES: dict[str, tuple[dict[str, Any], Formula]] = {
    "DPO": (
        {"beta": 0.7, "label_smoothing": 0.2},
        lambda s, b: -0.8 * logsigmoid(0.7 * margin(s.logratio)) - 0.2 * logsigmoid(-0.7 * margin(s.logratio)),
    ),
    "IPO": ({"tau": 0.3}, lambda s, b: (margin(s.logratio) - 1 / 0.6) ** 2),
    "SimPO": (
        {"beta": 3.0, "gamma_beta_ratio": 0.4},
        lambda s, b: -logsigmoid(3 * margin(s.logps / s.lengths) - 1.2),
    ),
    "CPO": ({"beta": 0.7, "lambda_": 0.3}, lambda s, b: -logsigmoid(0.7 * margin(s.logps)) - 0.3 * s.logps[:, 0]),
    "ORPO": (
        {"lambda_": 0.6},
        lambda s, b: -(s.logps / s.lengths)[:, 0] - 0.6 * logsigmoid(margin(odds(s))),
    ),
    "SLiC": ({"delta": 2.0, "lambda_": 0.3}, lambda s, b: relu(2 - margin(s.logps)) - 0.3 * s.logps[:, 0]),
    "RDPO": (
        {"beta": 0.7, "alpha": 0.3},
        lambda s, b: -logsigmoid(0.7 * margin(s.logratio) + 0.3 * margin(s.lengths.float())),
    ),
    "SPO": (
        {"alpha": 0.3, "gamma": 0.2},
        lambda s, b: spo_weight(s, 0.2) * softplus(-0.3 * margin(s.logps)) / 0.3,
    ),
    "EXORw": ({"beta": 0.7, "reward_beta": 0.3}, lambda s, b: softmax_kl(s, b, 0.7, 0.3, reverse=True)),
    "DPORw": ({"beta": 0.7, "reward_beta": 0.3}, lambda s, b: softmax_kl(s, b, 0.7, 0.3, reverse=False)),
    "EXOPref": (
        {"beta": 0.7, "epsilon": 0.1},
        lambda s, b: softmax_kl(
            s, b._replace(reward=torch.tensor([[0.9, 0.1]]).log().expand(len(b.row), 2)), 0.7, 1.0, reverse=True
        ),
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny"))


def disturbed(name: str, model: str, options: dict[str, Any]) -> AlignModule:
    module: AlignModule = getattr(objectives, name)(pair=PairSettings(model), **options)
    module.configure_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return module


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_a_batch_is_the_formula_of_its_scores(name: str, model: str) -> None:
    options, formula = CASES[name]
    module = disturbed(name, model, options)
    batch = random_groups(5, 2)
    reward = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    batch = batch._replace(reward=reward.sort(descending=True).values)
    with torch.no_grad():
        loss = module.loss(batch)
        scores = module.pair.score(batch)  # type: ignore[union-attr]
    torch.testing.assert_close(loss.value, formula(scores, batch), atol=1e-5, rtol=1e-5)
    assert (loss.weight == 1).all()
    assert loss.value.std() > 0


def test_kto_reads_the_mismatched_completions_for_z_and_for_nothing_else(model: str) -> None:
    module = disturbed("KTO", model, {"beta": 0.4, "good_weight": 1.5, "bad_weight": 0.5})
    source = random_groups(4, 1)
    prompts = [ids[mask] for ids, mask in zip(source.prompt_ids, source.prompt_mask, strict=True)]
    answers = [ids[mask] for ids, mask in zip(source.completion_ids[:, 0], source.completion_mask[:, 0], strict=True)]
    groups = [Group(i, prompts[i], [answers[i]], [label]) for i, label in enumerate((1.0, -1.0, -1.0, 1.0))]
    batch = collate_unpaired(groups, max_total=64)
    assert batch.present.shape == (4, 2)
    with torch.no_grad():
        loss = module.loss(batch)
        logratio = module.pair.score(batch).logratio  # type: ignore[union-attr]
        # the mismatched column, scored alone
        ids, mask = (field.roll(-1, 0) for field in (source.completion_ids, source.completion_mask))
        moved = source._replace(completion_ids=ids, completion_mask=mask)
        alone = module.pair.score(moved).logratio[:, 0]  # type: ignore[union-attr]
    torch.testing.assert_close(logratio[:, 1], alone, atol=1e-5, rtol=1e-5)
    z = alone.mean().clamp(min=0)
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0])
    weight = torch.tensor([1.5, 0.5, 0.5, 1.5])
    expected = weight * (1 - torch.sigmoid(0.4 * sign * (logratio[:, 0] - z)))
    torch.testing.assert_close(loss.value, expected, atol=1e-5, rtol=1e-5)
    module.monitor.training_steps.update(batch, module._scores, loss)
    seen = module.monitor.training_steps.compute()
    assert seen["train/logps/chosen"].item() == pytest.approx(module._scores.logps[[0, 3], 0].mean().item())  # type: ignore[union-attr]
    assert seen["train/rewards/margins"].item() == pytest.approx(
        0.4 * (logratio[[0, 3], 0].mean() - logratio[[1, 2], 0].mean()).item(), abs=1e-6
    )
    assert "train/logratio_margin" not in seen


def test_beta_dpo_takes_its_beta_from_the_kept_gaps_against_the_running_mean(model: str) -> None:
    module = disturbed("BetaDPO", model, {"beta": 0.3, "a": 0.5, "keep": 0.5})
    module.running.copy_(torch.tensor([0.08, 0.9]))  # type: ignore[operator, union-attr]
    module.corrected.fill_(0.4)  # type: ignore[operator, union-attr]
    batch = random_groups(6, 2)
    with torch.no_grad():
        loss = module.loss(batch)
        gap = margin(module.pair.score(batch).logratio)  # type: ignore[union-attr]
    kept = loss.weight.bool()
    assert kept.sum() == 3
    beta = max(1e-3, 0.3 * (1 + 0.5 * (gap[kept].mean().item() - 0.2)))
    assert loss.stats["beta"].item() == pytest.approx(beta, rel=1e-4)
    torch.testing.assert_close(loss.value, -logsigmoid(beta * gap), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("labels", [(1.0, 1.0, 1.0), (-1.0, -1.0, -1.0), (1.0,), (-1.0,)])
def test_kto_trains_on_one_sided_batches_and_on_batches_of_one(labels: tuple[float, ...], model: str) -> None:
    module = disturbed("KTO", model, {})
    source = random_groups(len(labels), 1)
    groups = [
        Group(i, source.prompt_ids[i][source.prompt_mask[i]], [source.completion_ids[i, 0, :3]], [label])
        for i, label in enumerate(labels)
    ]
    loss = module.loss(collate_unpaired(groups, max_total=64))
    loss.value.sum().backward()
    assert loss.value.isfinite().all()
    if len(labels) == 1:
        assert loss.stats["z"] == 0
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    module.monitor.training_steps.update(collate_unpaired(groups, max_total=64), module._scores, loss)
    assert all(value.isfinite() for value in module.monitor.training_steps.compute().values())


@pytest.mark.parametrize("name", ["EXORw", "DPORw", "RRHF", "RewardModel", "SFT", "BestOfN"])
def test_groups_of_unequal_size_count_as_if_alone(name: str, model: str) -> None:
    """A column that pads a group changes neither its loss nor the gradient."""
    module = disturbed(name, model, {})
    batch = random_groups(3, 4)
    batch = batch._replace(reward=torch.rand(3, 4).sort(descending=True)[0])
    present = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    ragged = batch._replace(present=present, completion_mask=batch.completion_mask & present[..., None])
    found = module.loss(ragged)
    (found.value * found.weight).sum().backward()
    gradient = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    for b in range(3):
        count = int(present[b].sum())
        one = batch.rows(slice(b, b + 1))
        alone = module.loss(
            one._replace(
                completion_ids=one.completion_ids[:, :count],
                completion_mask=one.completion_mask[:, :count],
                reward=one.reward[:, :count],  # type: ignore[index]
                present=one.present[:, :count],
            )
        )
        total = (alone.value * alone.weight).sum()
        total.backward()
        torch.testing.assert_close((found.value * found.weight)[b].sum(), total, atol=1e-5, rtol=1e-5)
    for p, q in zip(gradient, [p.grad for p in module.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["SFT", "REINFORCE", "RWR", "ReST", "BestOfN"])
def test_the_mismatched_completions_of_unpaired_data_are_refused_by_all_that_would_learn_from_them(name: str) -> None:
    batch = random_groups(3, 1)._replace(reward=torch.ones(3, 1))
    check_groups(objectives.KTO, UnpairedData("labels.jsonl"), batch)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=f"{name} learns from every completion .* UnpairedData puts that of another"):
        check_groups(getattr(objectives, name), UnpairedData("labels.jsonl"), batch)
