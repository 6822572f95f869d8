from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_align.batch import Perturbed, Scores
from lit_align.errors import UserError
from lit_align.objectives.dpo import DPO, dpo_loss
from lit_align.objectives.eps_dpo import EpsilonDPO, adapted_beta, monotone_step
from lit_align.settings import OptimSettings, PairSettings
from tests.families import save_tiny
from tests.objectives.contract import ObjectiveContract, random_groups, train


def pair_scores(policy: Tensor, reference: Tensor, epsilon: float, ids: Tensor) -> Scores:
    """Scores of (B, 2, L) tokens straight from the definition, given both models' logits (B, 2, L, V)."""

    def logps(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]

    outward = logps((1 + epsilon) * policy - epsilon * reference)
    inward = logps((1 - epsilon) * policy + epsilon * reference)
    lengths = torch.full(ids.shape[:2], ids.shape[2])
    return Scores(logps(policy), logps(reference), Perturbed(outward, inward), None, None, lengths)


class TestEpsilonDPO(ObjectiveContract):
    """Its value at given log-ratios and decisions; the decisions have tests of their own below."""

    objective = EpsilonDPO
    step = torch.tensor([1, -1, 0, 1, 0, -1])

    def loss(self, logratio: Tensor) -> Tensor:
        beta = adapted_beta(torch.ones(len(logratio)), torch.tensor(0.01, dtype=torch.float64), 0.01)
        return dpo_loss(logratio, beta.to(logratio.dtype))

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [3.0, 3.0], math.log(2)
        # β̃ = 0.01/1.01; a margin of 101 ln 3 gives σ = 3/4
        yield [101 * math.log(3), 0.0], math.log(4 / 3)
        yield [0.0, 101 * math.log(3)], math.log(4)


def test_beta_moves_as_the_paper_says() -> None:
    beta = adapted_beta(torch.tensor([1, 0, -1]), torch.tensor(0.02, dtype=torch.float64), 0.25)
    assert beta.tolist() == pytest.approx([0.016, 0.02, 0.08 / 3])


def test_one_token_of_two_words_worked_by_hand() -> None:
    """V = 2, chosen word 0, rejected word 1: z(λ) is the logit gap under the mixture, which is linear in λ.

    z(λ) = λ·gap + (1-λ)·reference gap, so it rises with λ exactly where the policy's gap exceeds the reference's.
    """
    ids = torch.tensor([[[0], [1]]])
    for gap, reference_gap, expected in ((2.0, 1.0, 1), (1.0, 2.0, -1), (-1.0, -2.0, 1), (1.5, 1.5, 0)):
        policy = torch.tensor([gap, 0.0], dtype=torch.float64).expand(1, 2, 1, 2)
        reference = torch.tensor([reference_gap, 0.0], dtype=torch.float64).expand(1, 2, 1, 2)
        assert monotone_step(pair_scores(policy, reference, 0.1, ids)).tolist() == [expected]


def test_a_pair_that_turns_between_the_two_perturbations_stays() -> None:
    """z must move the same way on both sides; equality on either side is no step."""
    zero = torch.zeros(4, 2, 1)
    outward = torch.tensor([[[1.0], [0.0]], [[1.0], [0.0]], [[0.0], [0.0]], [[-1.0], [0.0]]])
    inward = torch.tensor([[[1.0], [0.0]], [[-1.0], [0.0]], [[-1.0], [0.0]], [[1.0], [0.0]]])
    scores = Scores(zero, zero, Perturbed(outward, inward), None, None, torch.ones(4, 2))
    assert monotone_step(scores).tolist() == [0, 1, 0, -1]


def test_the_sign_of_the_step_is_the_derivative_of_the_log_ratio() -> None:
    """As ε → 0 the step is the sign of (M_w - M_l) - [Σ KL on the chosen's prefixes - the same on the rejected's]."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(64, 2, 5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, 9, (64, 2, 5), generator=generator)
    step = monotone_step(pair_scores(policy, reference, 1e-5, ids))
    log_p, log_q = policy.log_softmax(-1), reference.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    logratio = (log_p - log_q).gather(-1, ids[..., None])[..., 0]
    derivative = (logratio - kl).sum(-1)
    assert torch.equal(step, (derivative[:, 0] - derivative[:, 1]).sign().long())
    assert 10 < (step > 0).sum() < 54


def tiny_module(tmp_path: Path, kind: type, **options: float) -> DPO | EpsilonDPO:
    optim = OptimSettings(learning_rate=1e-2, warmup=0.0, schedule="constant")
    return kind(pair=PairSettings(save_tiny("llama", tmp_path)), optim=optim, **options)


def test_without_perturbation_it_is_dpo(tmp_path: Path) -> None:
    groups = random_groups(8, 2)
    plain = train(tiny_module(tmp_path, DPO, beta=0.3), groups, [4, 4], 1)
    ours = train(tiny_module(tmp_path, EpsilonDPO, beta=0.3, epsilon=0.0), groups, [4, 4], 1)
    assert plain.pair is not None
    assert ours.pair is not None
    for (name, p), (_, q) in zip(plain.pair.named_parameters(), ours.pair.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name, atol=1e-6, rtol=1e-5)
    assert ours.beta.item() == 0.3  # type: ignore[union-attr]


def test_beta_is_the_mean_over_all_pairs_of_each_optimizer_step(tmp_path: Path) -> None:
    """Follow the decisions of every micro-batch from outside, and work β's path from them."""
    module = tiny_module(tmp_path, EpsilonDPO, beta=0.2, epsilon=0.1)
    seen: list[tuple[float, int, int, int]] = []
    original = module.loss

    def watched(batch):  # type: ignore[no-untyped-def]
        loss = original(batch)
        up = round(loss.stats["steps_up"].item() * len(batch.row))
        down = round(loss.stats["steps_down"].item() * len(batch.row))
        seen.append((module.beta.item(), up, down, len(batch.row)))  # type: ignore[union-attr, operator]
        return loss

    module.loss = watched  # type: ignore[method-assign, assignment]
    train(module, random_groups(24, 2), [5, 3, 8, 2, 6], 2)
    beta = 0.2
    for step in ([0, 1], [2, 3], [4]):
        total = count = 0.0
        for start, up, down, size in (seen[i] for i in step):
            assert start == pytest.approx(beta)  # constant within an optimizer step
            total += up * beta / 1.1 + down * beta / 0.9 + (size - up - down) * beta
            count += size
        beta = total / count
    assert module.beta.item() == pytest.approx(beta)  # type: ignore[union-attr, operator]
    assert beta != 0.2


def test_beta_rests_in_validation_and_is_in_the_state(tmp_path: Path) -> None:
    module = train(
        tiny_module(tmp_path, EpsilonDPO, beta=0.2, epsilon=0.1), random_groups(8, 2), [4, 4], 1, max_epochs=3
    )
    beta = module.beta.clone()  # type: ignore[operator, union-attr]
    module.eval()
    module.loss(random_groups(8, 2, seed=1))
    module.train()
    assert module.step_beta._update_count == 0  # type: ignore[union-attr]
    assert torch.equal(module.state_dict()["beta"], beta)
    assert beta != 0.2


@pytest.mark.parametrize(
    ("name", "value", "accepted"), [("beta", 0.0, "greater than 0"), ("epsilon", 1.0, r"\[0, 1\)")]
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: float, accepted: str) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}.*{accepted}"):
        EpsilonDPO(**{name: value})
