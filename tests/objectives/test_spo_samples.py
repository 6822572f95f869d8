"""SPO's KL on samples of the policy, and the whole loss, against plain implementations and enumeration."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_align.batch import CompletionBatch
from lit_align.objectives.spo import SPO, samples_kl
from tests.families import save_tiny
from tests.objectives.beside import build, byte_model, mixed
from tests.objectives.contract import random_groups


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_model(tmp_path_factory.mktemp("tiny"))


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
