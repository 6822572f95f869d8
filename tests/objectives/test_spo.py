"""SPO: its preference term, its KL on samples of the policy, and both together in training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_align.batch import CompletionBatch, MixedBatch, Rollout
from lit_align.data import MixedData, PreferenceData
from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.objectives.dpo import DPO
from lit_align.objectives.spo import SPO, samples_kl, soft_importance, spo_loss
from lit_align.settings import OptimSettings, PairSettings
from tests.data.conftest import byte_tokenizer, pair_rows, write_jsonl
from tests.families import save_tiny
from tests.objectives.contract import ObjectiveContract, random_groups, train
from tests.test_module import KeepState

OPTIM = OptimSettings(learning_rate=1e-3, warmup=0.0, schedule="constant")


class TestSPO(ObjectiveContract):
    """The preference term, which needs pairs only."""

    objective = SPO

    def build(self, model: str) -> AlignModule:
        return SPO(beta=0.0, pair=PairSettings(model), optim=OPTIM)

    def loss(self, logratio: Tensor) -> Tensor:
        return spo_loss(logratio, alpha=0.01)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [-3.0, -3.0], 100 * math.log(2)
        yield [0.0, -100 * math.log(3)], 100 * math.log(4 / 3)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_fixed_point_on_a_tabular_policy_is_the_softmax_of_the_reward(alpha: float, weighted: bool) -> None:
    """Under Bradley-Terry preferences of all pairs, the expected loss is stationary exactly at softmax(r/α).

    Theorems 1 and 2 of arXiv 2405.00747: with any constant weights, here those of SoftImportance.
    """
    reward = torch.tensor([0.3, -0.8, 1.1, 0.0, 0.5], dtype=torch.float64)

    def gradient(logits: Tensor) -> Tensor:
        logits = logits.clone().requires_grad_()
        logps = logits.log_softmax(-1)
        i, j = torch.combinations(torch.arange(5), 2).unbind(1)
        both = torch.stack([logps[i], logps[j]], 1)
        weight = soft_importance(both, 0.7, torch.tensor(-0.2)) if weighted else 1.0
        preferred = torch.sigmoid(reward[i] - reward[j])
        loss = preferred * spo_loss(both, alpha, weight) + (1 - preferred) * spo_loss(both.flip(1), alpha, weight)
        (found,) = torch.autograd.grad(loss.sum(), logits)
        return found

    assert gradient(reward / alpha).abs().max() < 1e-12
    assert gradient(reward / (1.1 * alpha)).abs().max() > 1e-4


def test_the_loss_at_alpha_zero_is_the_limit_of_the_gradient() -> None:
    logps = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    (limit,) = torch.autograd.grad(spo_loss(logps, 0.0).sum(), logps)
    (near,) = torch.autograd.grad(spo_loss(logps, 1e-9).sum(), logps)
    torch.testing.assert_close(limit, near, atol=1e-8, rtol=0)
    assert limit.tolist() == [[-0.5, 0.5]] * 6


def test_soft_importance_worked_by_hand() -> None:
    logps = torch.tensor([[math.log(0.2), math.log(0.1)], [math.log(0.02), math.log(0.01)]], dtype=torch.float64)
    center = torch.tensor((math.log(0.3) + math.log(0.03)) / 2)
    # γ = 2: 2 log 0.3 - 2 c = log 10, and the other way round; σ(± ln 10) = 10/11, 1/11
    found = soft_importance(logps.requires_grad_(), 2.0, 2 * center)
    assert found.tolist() == pytest.approx([10 / 11, 1 / 11])
    assert not found.requires_grad
    assert soft_importance(logps, 0.0, center).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_hyperparameters_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is -0.1.*0 or more"):
        SPO(**{name: -0.1})


def test_a_loss_without_lower_bound_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.alpha and model.beta are 0.*no lower bound"):
        SPO(alpha=0, beta=0)
    assert SPO(alpha=0, beta=0.01).alpha == 0


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.3), (2.0, 0.05), (0.0, 1.0)])
def test_the_regularizer_moves_the_fixed_point_as_the_algebra_says(alpha: float, beta: float) -> None:
    """Stationary where β π_i (log π_i/π_ref,i - KL) = Σ_j μ_ij (P(i > j) - σ(α (log π_i - log π_j))) for every i.

    So for any π the reference log π_ref,i = log π_i - g_i / (β π_i) - c, with g the right side, makes π the fixed
    point; c normalizes it and is the KL, since the g_i add up to 0.
    """
    generator = torch.Generator().manual_seed(3)
    logps = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    reward = torch.tensor([0.3, -0.8, 1.1, 0.0, 0.5], dtype=torch.float64)
    mu = torch.sigmoid(0.7 * torch.logaddexp(logps[:, None], logps))
    drive = mu * (torch.sigmoid(reward[:, None] - reward) - torch.sigmoid(alpha * (logps[:, None] - logps)))
    reference = (logps - drive.sum(1) / (beta * logps.exp())).log_softmax(-1)

    def gradient(beta: float) -> Tensor:
        logits = logps.clone().requires_grad_()
        log_p = logits.log_softmax(-1)
        i, j = torch.combinations(torch.arange(5), 2).unbind(1)
        both = torch.stack([log_p[i], log_p[j]], 1)
        preferred, weight = torch.sigmoid(reward[i] - reward[j]), soft_importance(both, 0.7, torch.tensor(0.0))
        loss = preferred * spo_loss(both, alpha, weight) + (1 - preferred) * spo_loss(both.flip(1), alpha, weight)
        kl = samples_kl((log_p.exp() * (log_p - reference)).sum().view(1, 1, 1))
        (found,) = torch.autograd.grad(loss.sum() + beta * kl, logits)
        return found

    assert gradient(beta).abs().max() < 1e-12
    assert gradient(1.1 * beta).abs().max() > 1e-3


class Beside(NamedTuple):
    """Pairs, and twice as many samples, cut together."""

    pairs: CompletionBatch
    samples: Rollout

    def rows(self, index: slice) -> MixedBatch:
        return MixedBatch(self.pairs.rows(index), self.samples.rows(slice(2 * index.start, 2 * index.stop)))


def mixed(pairs: int) -> Beside:
    return Beside(random_groups(pairs, 2), Rollout(random_groups(2 * pairs, 1, seed=5)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama over the bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    return save_tiny("llama", folder, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)


def build(model: str, disturb: float = 0.0, **options: Any) -> SPO:
    """SPO on a model, its policy away from the reference by random factors."""
    module = SPO(pair=PairSettings(model), optim=OPTIM, **options)
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and (disturb or "lora_A" in name):
            torch.nn.init.normal_(parameter, 0.0, disturb or 0.2, generator=generator)
    return module


def log_softmaxes(module: SPO, prompt: Tensor, completion: Tensor) -> tuple[Tensor, Tensor]:
    """log π_θ and log π_ref over the vocabulary where each completion token is predicted, (L, V); one plain forward."""
    assert module.pair is not None
    ids = torch.cat([prompt, completion])[None]
    where = slice(len(prompt) - 1, -1)
    policy = module.pair.policy(ids).logits[0, where].log_softmax(-1)
    with torch.no_grad(), module.pair.policy.disable_adapter():
        return policy, module.pair.policy(ids).logits[0, where].log_softmax(-1)


def tokens(batch: CompletionBatch, group: int, column: int) -> tuple[Tensor, Tensor]:
    """A prompt and one of its completions without padding."""
    prompt = batch.prompt_ids[group][batch.prompt_mask[group]]
    return prompt, batch.completion_ids[group, column][batch.completion_mask[group, column]]


def gradients(module: SPO, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() != set()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.3, "beta": 0.7, "gamma": 0.2},
        {"alpha": 0.0, "beta": 0.7},
        {"alpha": 0.1, "beta": 0.0, "gamma": 0.5},
    ],
    ids=str,
)
def test_the_whole_loss_is_that_of_a_plain_implementation(model: str, options: dict[str, float]) -> None:
    """One forward for each sequence, full logits, formulas as printed."""
    module, batch = build(model, 0.1, **options), mixed(3).rows(slice(0, 3))
    alpha, beta, gamma = options["alpha"], options["beta"], options.get("gamma", 0.0)
    loss = module.loss(batch)
    found = gradients(module, (loss.value * loss.weight).sum() / loss.weight.sum())

    rows: list[Tensor] = []
    for group in range(3):
        log_p = [log_softmaxes(module, *tokens(batch.preference, group, k))[0] for k in (0, 1)]
        ids = [tokens(batch.preference, group, k)[1] for k in (0, 1)]
        rows.append(torch.stack([p[torch.arange(len(y)), y].sum() for p, y in zip(log_p, ids, strict=True)]))
    logps = torch.stack(rows)
    joint = logps.detach().exp().sum(1).log()
    mu = torch.sigmoid(gamma * joint - (gamma * joint).mean()) if gamma else torch.ones(3)
    s = logps[:, 0] - logps[:, 1]
    preference = -mu * s / 2 if alpha == 0 else mu / alpha * torch.log(1 + torch.exp(-alpha * s))
    divergences = []
    for group in range(6):
        log_p, log_q = log_softmaxes(module, *tokens(batch.samples.completions, group, 0))
        divergences.append((log_p.exp() * (log_p - log_q)).sum())
    kl = torch.stack(divergences).mean()
    expected = preference + beta * kl
    torch.testing.assert_close(loss.value, expected, atol=1e-4, rtol=1e-4)
    assert kl.item() > 0.1
    assert loss.stats["mu"].item() == pytest.approx(mu.mean().item(), rel=1e-4)
    if beta:
        assert loss.stats["kl_samples"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert_same(found, gradients(module, expected.mean()))


def test_the_regularizer_is_nothing_and_pulls_nowhere_at_the_reference(model: str) -> None:
    batch = mixed(3).rows(slice(0, 3))
    whole, term = build(model, beta=0.9), build(model, beta=0.0)
    ours, theirs = whole.loss(batch), term.loss(batch)
    assert ours.stats["kl_samples"] == 0
    assert torch.equal(ours.value, theirs.value)
    found, wanted = gradients(whole, ours.value.sum()), gradients(term, theirs.value.sum())
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert any(value.abs().max() > 0 for value in wanted.values())


def test_without_samples_the_loss_is_the_preference_term(model: str) -> None:
    batch = random_groups(3, 2)
    values = [build(model, 0.1, beta=beta).loss(batch).value for beta in (0.9, 0.0)]
    assert torch.equal(*values)


def every_completion(prompt: list[int], completions: list[tuple[int, ...]]) -> CompletionBatch:
    """Completions of one prompt, a group each."""
    count, length = len(completions), max(map(len, completions))
    padded = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in completions])
    mask = torch.arange(length) < torch.tensor([[len(ids)] for ids in completions])
    return CompletionBatch(
        prompt_ids=torch.tensor(prompt).expand(count, -1),
        prompt_mask=torch.ones(count, len(prompt), dtype=torch.bool),
        completion_ids=padded[:, None],
        completion_mask=mask[:, None],
        reward=None,
        present=torch.ones(count, 1, dtype=torch.bool),
        row=torch.arange(count),
    )


@pytest.mark.parametrize("length", [1, 3])
def test_on_average_over_samples_the_estimate_is_the_kl_of_sequences(tmp_path: Path, length: int) -> None:
    """Over all completions of at most some tokens, ended by token 2 before that: Σ π KL̂ = Σ π log π/π_ref.

    With one token KL̂ is the KL whatever was drawn. The gradient of Σ π KL̂ through KL̂ alone is checked there too.
    """
    module = build(save_tiny("llama", tmp_path, vocab_size=5), 0.2)
    assert module.pair is not None
    prompt = [3, 4, 1]
    strings = [ids for size in range(1, length + 1) for ids in itertools.product(range(5), repeat=size)]
    possible = [ids for ids in strings if 2 not in ids[:-1] and (ids[-1] == 2 or len(ids) == length)]
    logs = [log_softmaxes(module, torch.tensor(prompt), torch.tensor(ids)) for ids in possible]
    at = [(torch.arange(len(ids)), torch.tensor(ids)) for ids in possible]
    policy, reference = (
        torch.stack([log[which][where].sum() for log, where in zip(logs, at, strict=True)]) for which in (0, 1)
    )
    assert policy.exp().sum().item() == pytest.approx(1, abs=1e-5)
    expected = (policy.exp() * (policy - reference)).sum()
    batch = every_completion(prompt, possible)
    estimates = torch.stack(
        [samples_kl(module.pair.score(batch.rows(slice(i, i + 1)), kl=True).token_kl) for i in range(len(possible))]  # type: ignore[arg-type]
    )
    assert (policy.exp() * estimates).sum().item() == pytest.approx(expected.item(), rel=1e-4)
    assert expected.item() > 0.05
    if length == 1:
        torch.testing.assert_close(estimates, expected.expand(5), atol=1e-5, rtol=1e-4)
        assert_same(gradients(module, estimates[3]), gradients(module, expected))
    else:
        assert estimates.std() > 1e-3


def test_the_cut_into_micro_batches_changes_nothing(model: str) -> None:
    options = {"alpha": 0.3, "beta": 0.7}
    groups: Any = mixed(10)
    states = []
    for sizes, accumulate in (([6, 4], 1), ([2, 2, 2, 2, 2], 3), ([1, 3, 2, 1, 3], 3)):
        module = SPO(pair=PairSettings(model), optim=OPTIM, **options)
        train(module, groups, sizes, accumulate)
        states.append({name: value for name, value in module.state_dict().items() if "lora" in name})
    for state in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(state[name], value, atol=2e-5, rtol=1e-4, msg=name)
    without = train(SPO(alpha=0.3, beta=0.0, pair=PairSettings(model), optim=OPTIM), groups, [6, 4], 1)
    assert any((without.state_dict()[name] - value).abs().max() > 1e-4 for name, value in states[0].items())


def test_two_ranks_train_as_one_with_twice_the_accumulation(model: str, tmp_path: Path) -> None:
    groups: Any = mixed(12)
    states = []
    for name, accumulate, ranks in (("one", 2, {}), ("two", 1, {"strategy": "ddp_spawn", "devices": 2})):
        module = SPO(alpha=0.3, beta=0.7, pair=PairSettings(model), optim=OPTIM)
        train(module, groups, [4, 1, 3, 4], accumulate, callbacks=[KeepState(tmp_path / name)], **ranks)
        states.append(torch.load(tmp_path / name))
    one, two = states
    assert one.keys() == two.keys() != set()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class Losses(Callback):
    """Writes down what is logged of each step, except times."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, float]] = {}

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step and "train/loss" in trainer.callback_metrics:
            self.keep(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self.keep(trainer)

    def keep(self, trainer: Trainer) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        timed = ("tokens_per_second", "share_of_time")
        self.found[trainer.global_step] = {k: v for k, v in values.items() if not k.endswith(timed)}


def fit(model: str, source: Path, resume: str | None = None, **trainer: Any) -> tuple[SPO, dict[int, dict[str, float]]]:
    """Train with real draws, 10 pairs in 5 micro-batches an epoch."""
    torch.manual_seed(0)
    module, losses = SPO(alpha=0.3, beta=0.5, gamma=0.1, pair=PairSettings(model), optim=OPTIM), Losses()
    data = MixedData(
        str(source),
        batch_size=2,
        validation_size=0,
        samples=4,
        every_n_steps=3,
        max_new_tokens=6,
        validation_split=None,
    )
    fixed = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [losses, *trainer.pop("callbacks", [])]
    runner = Trainer(**fixed, **{"max_epochs": 2, "log_every_n_steps": 1, **trainer}, callbacks=callbacks)
    runner.fit(module, data, ckpt_path=resume, weights_only=True)
    return module, losses.found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_cut_between_two_draws_resumes_bit_for_bit(model: str, tmp_path: Path, accumulate: int) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", pair_rows(10))
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    options = {"accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    whole, logged = fit(model, source, callbacks=[saver], **options)
    assert all({"train/kl_samples", "train/mu", "train/loss"} <= set(values) for values in logged.values())
    assert [values["train/age"] for values in logged.values()] == [i % 3 for i in range(len(logged))]
    drawn = {step: values for step, values in logged.items() if (step - 1) % 3 == 0}
    names = {f"rollout/{name}" for name in ("length", "ended", "kl", "entropy")}
    assert all(names <= set(values) and "rollout/reward_missing" not in values for values in drawn.values())
    for step in (2, 3, 5):
        resumed, again = fit(
            model,
            source,
            str(tmp_path / f"step={step}.ckpt"),
            accumulate_grad_batches=accumulate,
            enable_checkpointing=False,
        )
        state = resumed.state_dict()
        assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items() if "lora" in name)
        assert min(again) == step + 1
        del again[step + 1]  # a checkpoint of a step comes before its report, which then shows both
        for taken, values in again.items():
            assert values == {name: value for name, value in logged[taken].items() if name in values}


def test_pairs_alone_are_refused_before_the_model_loads_unless_beta_is_0(model: str, tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "rows.jsonl", pair_rows(4)))
    options: Any = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_progress_bar": False}
    options |= {"enable_checkpointing": False, "enable_model_summary": False}
    module = SPO(pair=PairSettings(model))
    with pytest.raises(UserError, match=r"model.beta is 0.01.*--data MixedData, or --model.beta 0"):
        Trainer(**options).fit(module, PreferenceData(source))
    assert module.pair is None
    with pytest.raises(UserError, match=r"--data MixedData"):
        train(SPO(pair=PairSettings(model)), random_groups(4, 2), [4], 1)
    Trainer(**options).fit(SPO(beta=0.0, pair=PairSettings(model)), PreferenceData(source))


def test_samples_nobody_reads_are_refused(model: str, tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "rows.jsonl", pair_rows(4)))
    with pytest.raises(UserError, match=r"DPO does not read the samples .*MixedData.*--data PreferenceData"):
        Trainer(accelerator="cpu", logger=False).fit(DPO(pair=PairSettings(model)), MixedData(source))


def test_a_reference_that_is_not_the_start_stops_the_run(model: str) -> None:
    module = build(model, 0.1)
    with pytest.raises(UserError, match="before the first step policy and reference differ"):
        train(module, mixed(4), [4], 1)  # type: ignore[arg-type]
