from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch import Tensor

from lit_align import objectives
from lit_align.batch import CompletionBatch, Rollout, Sampling
from lit_align.data import PreferenceData
from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.objectives.ppo import PPO, adapted_kl_coef, clipped_policy_loss, clipped_value_loss, explained_variance
from lit_align.settings import OptimSettings, PairSettings
from lit_align.snapshot import COMPLETIONS_AT_ONCE, snapshot
from tests.families import save_tiny
from tests.objectives.buffers import fresh, padded, train_on
from tests.objectives.contract import ObjectiveContract, same_start
from tests.test_pair import plain_logps

PLAIN: dict[str, Any] = {
    "standardize": False,
    "kl_coef": 0.0,
    "kl_target": None,
    "lam": 1.0,
    "whiten": False,
    "value_coef": 0.0,
}
"""No penalty, no critic's loss, Monte Carlo returns as they are."""


def build(tmp_path: Path, rate: float = 1e-2, **options: Any) -> PPO:
    if not (tmp_path / "config.json").exists():
        save_tiny("llama", tmp_path)
    optim = OptimSettings(learning_rate=rate, weight_decay=0.1, warmup=0.0, schedule="constant")
    return PPO(pair=PairSettings(str(tmp_path)), optim=optim, **options)


def started(tmp_path: Path, critic: bool = True, **options: Any) -> PPO:
    """A module whose policy is not the reference, and whose critic says something if asked to."""
    module = build(tmp_path, **options)
    module.configure_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and (critic or name.startswith("pair.")):
                parameter.normal_(0, 0.1)
    return module


class TestPPO(ObjectiveContract):
    """The numbers are log ρ of a good token and of a bad one."""

    objective = PPO

    def loss(self, logratio: Tensor) -> Tensor:
        advantage = torch.tensor([1.0, -1.0], dtype=logratio.dtype)
        return clipped_policy_loss(logratio.exp(), advantage, 0.2).sum(-1)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [0.0, 0.0], 0.0
        yield [math.log(1.1), math.log(0.9)], -1.1 + 0.9
        yield [math.log(2), 0.0], -1.2 + 1  # no gain beyond the clip
        yield [0.0, math.log(0.5)], -1 + 0.8
        yield [math.log(0.5), math.log(2)], -0.5 + 2  # and no bound on the loss

    def test_padding_and_the_cut_into_micro_batches_change_nothing(self, model: str) -> None:
        """A buffer of 10 groups in two steps: whole, cut evenly, cut unevenly, and padded further."""
        rollout = fresh(10, 2)
        expected = train_on(self.build(model), rollout, [6, 4])
        for other, sizes, accumulate in (
            (rollout, [2, 2, 2, 2, 2], 3),
            (rollout, [1, 3, 2, 1, 3], 3),
            (padded(rollout), [6, 4], 1),
        ):
            self.assert_same_training(train_on(self.build(model), other, sizes, accumulate), expected)


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [
        (1.0, 1.3, 0.0), (1.0, 1.1, -1.0), (1.0, 0.5, -1.0),
        (-2.0, 0.7, 0.0), (-2.0, 0.9, 2.0), (-2.0, 1.5, 2.0),
    ],
)  # fmt: skip
def test_the_clip_takes_the_gradient_only_where_moving_on_would_gain(
    advantage: float, ratio: float, slope: float
) -> None:
    at = torch.tensor(ratio, requires_grad=True)
    clipped_policy_loss(at, torch.tensor(advantage), 0.2).backward()
    assert at.grad is not None
    assert at.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("value", "expected", "slope"),
    [
        (1.1, 0.5 * 0.9**2, -0.9),  # within the clip: the squared error to R = 2
        (1.5, 0.5 * 0.8**2, 0.0),  # beyond it, towards R: no gain
        (0.5, 0.5 * 1.5**2, -1.5),  # beyond it, away from R: the full error
    ],
)
def test_the_critic_gains_nothing_beyond_its_clip(value: float, expected: float, slope: float) -> None:
    at = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    loss = clipped_value_loss(at, torch.tensor(1.0), torch.tensor(2.0), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert at.grad is not None
    assert at.grad.item() == pytest.approx(slope)


def test_the_penalty_moves_towards_its_target_by_a_fifth_at_most_in_a_horizon() -> None:
    def after(kl: float) -> float:
        given = [torch.tensor(x, dtype=torch.float64) for x in (0.2, kl, 500)]
        return adapted_kl_coef(given[0], given[1], 6.0, given[2], 10000).item()

    assert after(6.0) == pytest.approx(0.2)
    assert after(6.6) == pytest.approx(0.2 * (1 + 0.1 * 0.05))
    assert after(60.0) == pytest.approx(0.2 * 1.01)
    assert after(0.0) == pytest.approx(0.2 * 0.99)
    # By a fifth at most, also where a buffer holds many horizons.
    many = [torch.tensor(x, dtype=torch.float64) for x in (0.2, 0.0, 128)]
    assert adapted_kl_coef(many[0], many[1], 6.0, many[2], 20).item() == pytest.approx(0.16)


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns + 5, returns) == 1
    assert explained_variance(torch.zeros(3), returns) == 0
    assert explained_variance(2 * returns, returns) == 0
    assert explained_variance(returns, torch.ones(3)) == 0
    assert explained_variance(returns[:0], returns[:0]) == 0


def test_the_first_minibatch_has_the_gradient_of_reinforce(tmp_path: Path) -> None:
    """With γ = λ = 1 and a critic at 0 the advantage of each token is the reward: -Σ r log π(y), per token."""
    module = started(tmp_path, critic=False, **PLAIN)
    assert module.head is not None
    torch.nn.init.zeros_(module.head.weight)
    torch.nn.init.zeros_(module.head.bias)
    rollout = fresh(5, 3)
    loss = module.loss(module.annotate(rollout))
    ((loss.value * loss.weight).sum() / loss.weight.sum()).backward()
    found = {n: p.grad.clone() for n, p in module.pair.named_parameters() if p.grad is not None}  # type: ignore[union-attr]
    module.zero_grad()
    groups = rollout.completions
    logps = plain_logps(module.pair.policy, groups)  # type: ignore[union-attr]
    total = torch.stack([-groups.reward[at] * each.sum() for at, each in logps.items()]).sum()  # type: ignore[index]
    (total / sum(len(each) for each in logps.values())).backward()
    assert loss.stats["ratio"].item() == pytest.approx(1, abs=1e-6)
    for name, parameter in module.pair.named_parameters():  # type: ignore[union-attr]
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1e-3


def test_a_buffer_is_annotated_by_the_definitions(tmp_path: Path) -> None:
    """γ = λ = 1: a return is the reward less the penalties from there on; the advantage is that less the value."""
    module = started(tmp_path, standardize=False, kl_coef=0.3, kl_target=2.0, lam=1.0, whiten=False)
    rollout = fresh(4, 3)
    groups = rollout.completions
    found = module.annotate(rollout)
    policy = plain_logps(module.pair.policy, groups)  # type: ignore[union-attr]
    with module.pair.as_reference():  # type: ignore[union-attr]
        reference = plain_logps(module.pair.policy, groups)  # type: ignore[union-attr]
    kl = []
    for at, logps in policy.items():
        logratio, length = (logps - reference[at]).detach(), len(logps)
        kl.append(logratio.sum().item())
        returns = groups.reward[at] - 0.3 * logratio.flip(0).cumsum(0).flip(0)  # type: ignore[index]
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(found.old_logps[at][:length], logps.detach(), **close)  # type: ignore[index]
        torch.testing.assert_close(found.reference_logps[at][:length], reference[at].detach(), **close)  # type: ignore[index]
        torch.testing.assert_close(found.returns[at][:length], returns, **close)  # type: ignore[index]
        torch.testing.assert_close(
            found.advantage[at][:length],
            returns - found.old_values[at][:length],
            **close,  # type: ignore[index]
        )
        assert (found.old_values[at][:length] != 0).all()  # type: ignore[index]
    outside = ~groups.completion_mask
    for field in found[1:-1]:
        assert field is not None
        assert not field.requires_grad
        assert (field[outside] == 0).all()
    error = min(0.2, max(-0.2, sum(kl) / 12 / 2.0 - 1))
    assert module.kl_coef.item() == pytest.approx(0.3 * (1 + error * 12 / 10000), rel=1e-9)
    assert module.kl_coef != 0.3


def test_advantages_are_whitened_over_the_buffer_and_returns_are_not(tmp_path: Path) -> None:
    module, plain = started(tmp_path), started(tmp_path, whiten=False)
    rollout = fresh(6, 2)
    found, raw = module.annotate(rollout), plain.annotate(rollout)
    mask = rollout.completions.completion_mask
    tokens = found.advantage[mask]  # type: ignore[index]
    assert tokens.mean().item() == pytest.approx(0, abs=1e-6)
    assert tokens.std().item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(found.returns, raw.returns)  # type: ignore[arg-type]


def test_a_group_whose_reward_failed_counts_for_nothing(tmp_path: Path) -> None:
    module = started(tmp_path)
    rollout = fresh(5, 2)
    groups = rollout.completions
    assert groups.reward is not None
    gone = torch.tensor([False, False, True, False, False])[:, None]
    bad = groups._replace(present=groups.present & ~gone, reward=groups.reward.masked_fill(gone, math.nan))
    beta = module.kl_coef.clone()
    found = module.annotate(rollout._replace(completions=bad))
    moved, kept = module.kl_coef, torch.tensor([0, 1, 3, 4])
    module.kl_coef = beta
    alone = module.annotate(rollout.rows(kept))
    torch.testing.assert_close(module.kl_coef, moved)
    whole, rest = module.loss(found), module.loss(alone)
    assert (whole.weight[2] == 0).all()
    torch.testing.assert_close(whole.value[kept], rest.value, atol=1e-5, rtol=1e-5)
    for name, value in whole.stats.items():
        torch.testing.assert_close(value, rest.stats[name], atol=1e-5, rtol=1e-4, msg=name)
    (whole.value * whole.weight).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_a_buffer_larger_than_a_pass_is_scored_the_same(tmp_path: Path) -> None:
    module = started(tmp_path)
    groups = fresh(COMPLETIONS_AT_ONCE, 3).completions
    sizes: list[int] = []

    def score(part: CompletionBatch) -> Any:
        sizes.append(part.present.numel())
        return module.score(part, value_head=module.values)

    found = snapshot(score, groups)
    whole = module.score(groups, value_head=module.values)
    assert max(sizes) <= COMPLETIONS_AT_ONCE
    assert sum(sizes) == groups.present.numel()
    assert not found.token_logps.requires_grad
    for name in ("token_logps", "reference_token_logps", "values", "lengths"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), atol=1e-5, rtol=1e-5)


def state_of(module: AlignModule) -> dict[str, Tensor]:
    """What is trained and adapted."""
    kept = ("lora", "kl_coef", "stopped", "head.weight", "head.bias")
    state = module.state_dict()
    return {n: v.clone() for n, v in state.items() if any(part in n for part in kept) and "lm_head" not in n}


class Steps(Callback):
    """Trained state after each micro-batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.seen.append(state_of(pl_module))


def test_once_too_far_the_rest_of_the_buffer_moves_nothing(tmp_path: Path) -> None:
    """The first step of a buffer finds no distance, the second does: as if there were one pass a buffer."""
    rollout, steps = fresh(4, 2), Steps()
    module = train_on(build(tmp_path, target_kl=1e-9), rollout, [4], passes=3, max_epochs=2, callbacks=[steps])
    once = train_on(build(tmp_path, target_kl=None), rollout, [4], passes=1, max_epochs=2)
    free = train_on(build(tmp_path, target_kl=None), rollout, [4], passes=3, max_epochs=2)
    assert [bool(state["stopped"]) for state in steps.seen] == [False, True, True, False, True, True]
    found, expected, other = state_of(module), state_of(once), state_of(free)
    for name in expected:
        if name != "stopped":
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5, msg=name)
    assert (other["head.weight"] - expected["head.weight"]).abs().max() > 1e-3
    optimizer = module.trainer.optimizers[0].state
    assert {int(state["step"]) for state in optimizer.values()} == {2}


def test_while_the_critic_warms_up_the_policy_does_not_move(tmp_path: Path) -> None:
    rollout, steps = fresh(4, 2), Steps()
    train_on(build(tmp_path, critic_warmup_steps=2), rollout, [4], passes=3, callbacks=[steps])
    first, second, third = steps.seen
    adapter = [name for name in first if "lora" in name]
    assert all(torch.equal(first[name], second[name]) for name in adapter)
    assert not any(second[name].any() for name in adapter if "lora_B" in name)
    assert all(third[name].any() for name in adapter)
    assert not torch.equal(first["head.weight"], second["head.weight"])


class Keep(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            torch.save(state_of(pl_module), self.path)


def test_neither_scale_nor_origin_of_the_reward_counts_unless_asked_for(tmp_path: Path) -> None:
    rollout = fresh(5, 3)
    groups = rollout.completions
    assert groups.reward is not None
    other = rollout._replace(completions=groups._replace(reward=40 * groups.reward - 300))
    module = started(tmp_path)
    found = [module.annotate(each).advantage for each in (rollout, other)]
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)
    module.standardize = False
    raw = [module.annotate(each).advantage for each in (rollout, other)]
    assert (raw[0] - raw[1]).abs().max() > 0.1  # type: ignore[operator]


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """Uneven micro-batches, two buffers: advantages, the penalty and the gradient are those of all ranks."""
    rollout, sizes = fresh(12, 2), [4, 1, 2, 5]
    options = {"kl_target": 0.01, "kl_horizon": 50.0, "target_kl": 1e-4}
    for name, accumulate, ranks in (("one", 2, {}), ("two", 1, {"strategy": "ddp_spawn", "devices": 2})):
        module = build(tmp_path, 3e-3, **options)
        train_on(module, rollout, sizes, accumulate, max_epochs=2, callbacks=[Keep(tmp_path / name)], **ranks)
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert one["kl_coef"] < 0.2 * 0.995


def test_critic_and_penalty_are_in_the_state_and_not_in_the_adapter(tmp_path: Path) -> None:
    module = started(tmp_path / "model")
    module.annotate(fresh(4, 2))
    checkpoint = {"state_dict": dict(module.state_dict())}
    module.on_save_checkpoint(checkpoint)
    assert {"head.weight", "head.bias", "kl_coef", "stopped"} <= checkpoint["state_dict"].keys()
    resumed = build(tmp_path / "model")
    resumed.configure_model()
    resumed.load_state_dict(checkpoint["state_dict"], strict=False)
    assert torch.equal(resumed.head.weight, module.head.weight)  # type: ignore[union-attr]
    assert resumed.kl_coef == module.kl_coef != 0.2
    module.save(tmp_path / "adapter")
    assert all("lora" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_the_critic_begins_at_0_and_its_loss_reaches_head_and_adapter(tmp_path: Path) -> None:
    module = build(tmp_path)
    module.configure_model()
    rollout = module.annotate(fresh(3, 2))
    assert (rollout.old_values == 0).all()
    critic = started(tmp_path)
    scores = critic.score(rollout.completions, value_head=critic.values)
    scores.values.square().sum().backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.any() for p in critic.parameters() if p.requires_grad)


def drawn(module: AlignModule, prompts: CompletionBatch, wanted: Tensor) -> Rollout:
    """Completions of one token, rewarded by which it is."""
    rollout = module.generate(prompts, 64, Sampling(1, seed=int(torch.randint(2**31, ()))))
    groups = rollout.completions
    return rollout._replace(completions=groups._replace(reward=wanted[groups.completion_ids[..., 0]]))


@pytest.mark.parametrize("name", ["PPO", "BanditPPO"])
def test_the_expected_reward_by_enumeration_rises(name: str, tmp_path: Path) -> None:
    """Completions of one token: Σ_v π(v|x) r(v), over the vocabulary, before and after."""
    model = save_tiny("llama", tmp_path)
    optim = OptimSettings(learning_rate=3e-3, warmup=0.0, schedule="constant")
    module = getattr(objectives, name)(pair=PairSettings(model), optim=optim)
    module.configure_model()
    torch.manual_seed(0)
    same_start(module)
    prompts = fresh(4, 1).completions
    wanted = torch.randn(61)
    every = torch.arange(61).expand(4, 61)[..., None]
    table = prompts._replace(
        completion_ids=every, completion_mask=torch.ones_like(every).bool(), present=torch.ones(4, 61).bool()
    )

    def expected() -> float:
        with torch.no_grad():
            chance = module.pair.score(table, reference=False).logps.exp()
        torch.testing.assert_close(chance.sum(-1), torch.ones(4), atol=1e-4, rtol=0)
        return (chance * wanted).sum(-1).mean().item()

    before = expected()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(6):
        rollout = module.annotate(drawn(module, prompts, wanted))
        for _ in range(4):
            optimizer.zero_grad()
            loss = module.loss(rollout)
            ((loss.value * loss.weight).sum() / loss.weight.sum()).backward()
            optimizer.step()
    assert expected() - before > 0.3


def test_a_tabular_policy_climbs_and_stays_near_the_old_one() -> None:
    """All completions enumerated, each weighed by π_old: one buffer raises E[r] but no ratio far beyond the clip."""
    reward = torch.tensor([1.0, 0.5, -0.5, -1.0, 0.2], dtype=torch.float64)
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    earned = [0.04]
    for _ in range(10):
        old = logits.detach().softmax(-1)
        advantage = reward - (old * reward).sum()
        for _ in range(30):
            optimizer.zero_grad()
            ratio = logits.softmax(-1) / old
            (old * clipped_policy_loss(ratio, advantage, 0.2)).sum().backward()
            optimizer.step()
        earned.append((logits.softmax(-1) * reward).sum().item())
        # Only A < 0 and its normalisation still push once all good actions are clipped.
        assert (logits.softmax(-1) / old).max() < 1.4
    assert all(after > before for before, after in pairwise(earned))
    assert earned[-1] > 0.5


def test_completions_of_a_dataset_are_refused_before_the_model_loads(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
    module = PPO(pair=PairSettings(str(tmp_path / "absent")))
    module._tokenizer = PPO(pair=PairSettings("stories")).tokenizer
    with pytest.raises(UserError, match=r"PPO learns from completions the policy.*PreferenceData.*--data OnPolicyData"):
        trainer.fit(module, datamodule=PreferenceData(max_rows=16))


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("clip", 0.0, "greater than 0"),
        ("value_clip", -1.0, "greater than 0"),
        ("value_coef", -0.1, "0 or more"),
        ("gamma", 1.1, r"in \[0, 1\]"),
        ("lam", -0.1, r"in \[0, 1\]"),
        ("kl_coef", -0.2, "0 or more"),
        ("kl_target", 0.0, "greater than 0"),
        ("kl_horizon", 0.0, "greater than 0"),
        ("target_kl", 0.0, "greater than 0"),
        ("critic_warmup_steps", -1, "0 or more"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: float, accepted: str) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}.*{accepted}"):
        PPO(**{name: value})
