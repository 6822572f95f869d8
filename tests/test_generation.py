"""What is drawn: against exact probabilities, the scorer, and the promise that only seed, row and column matter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Rollout, Sampling
from lit_align.errors import UserError
from lit_align.generation import choose, truncated, uniforms
from lit_align.pair import PolicyReferencePair
from lit_align.settings import PairSettings
from tests.families import FAMILIES, VOCABULARY, ragged_batch, save_tiny
from tests.test_pair import disturbed

EOS = 2


def a_pair(folder: Path, family: str = "llama", **settings: Any) -> PolicyReferencePair:
    return disturbed(PolicyReferencePair(PairSettings(save_tiny(family, folder), **settings)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> PolicyReferencePair:
    return a_pair(tmp_path_factory.mktemp("model"), temperature=2.0)


def one_prompt(row: int = 0) -> CompletionBatch:
    return ragged_batch().rows(slice(1, 2))._replace(row=torch.tensor([row]))


@torch.no_grad()
def next_logps(pair: PolicyReferencePair, ids: Tensor, temperature: float = 2.0) -> Tensor:
    """log π(·|text) by the model's own forward, float64 (N, V)."""
    return (pair.policy(input_ids=ids).logits[:, -1].double() / temperature).log_softmax(-1)


def chi_square(counts: Tensor, expected: Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells of fewer than 5 expected draws are one."""
    rare = expected < 5
    seen = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    due = torch.cat([expected[~rare], expected[rare].sum()[None]])
    return float(((seen - due) ** 2 / due).sum()), len(due) - 1


def test_draws_are_as_frequent_as_the_models_own_probabilities_say(pair: PolicyReferencePair) -> None:
    """The first two tokens jointly, against the exact joint distribution, which all 61 first tokens span."""
    prompt = one_prompt()
    text = prompt.prompt_ids[:, : int(prompt.prompt_mask.sum())]
    first = next_logps(pair, text)[0]
    texts = torch.cat([text.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], 1)
    joint = (first[:, None] + next_logps(pair, texts)).exp()
    joint[EOS] = 0
    joint[EOS, 0] = first[EOS].exp()  # it ended: there is no second token

    drawn = pair.generate(prompt, 6000, Sampling(2, seed=1)).completions
    one, two = drawn.completion_ids[0].T
    counts = torch.zeros(VOCABULARY, VOCABULARY).index_put((one, two), torch.ones(6000), accumulate=True)
    assert counts[EOS].sum() == counts[EOS, 0] > 0
    statistic, free = chi_square(counts.flatten(), 6000 * joint.flatten())
    assert free > 50
    assert abs(statistic - free) < 4 * math.sqrt(2 * free)


def test_streams_are_uniform_and_differ_by_seed_row_and_column() -> None:
    streams = uniforms(3, range(40), range(5), 50)
    assert streams.shape == (200, 50)
    assert ((streams >= 0) & (streams < 1)).all()
    assert abs(streams.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 10_000)
    together = torch.corrcoef(streams) - torch.eye(200, dtype=torch.float64)
    assert together.abs().max() < 6 / math.sqrt(50)
    assert torch.equal(streams.view(40, 5, 50)[7, 3], uniforms(3, [7], [3], 50)[0])
    assert torch.equal(uniforms(3, [7], [3], 9)[0], uniforms(3, [7], [3], 50)[0, :9])
    assert not torch.equal(uniforms(3, [7], [3], 9), uniforms(4, [7], [3], 9))


def test_choice_inverts_the_distribution_function() -> None:
    """Masses 1/2, 0, 1/4, 1/4, in the order of the vocabulary; and a large vocabulary to the last token."""
    scores = torch.tensor([[math.log(2.0), -torch.inf, 0.0, 0.0]]).expand(6, 4)
    token, logp = choose(scores, torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-53], dtype=torch.float64))
    assert token.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logp.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.25]))
    at = torch.tensor([7, 100_001, 262_143])
    token, _ = choose(torch.zeros(3, 2**18), (at.double() + 0.5) / 2**18)
    assert torch.equal(token, at)


def test_truncation_keeps_the_likeliest_and_what_ties_with_the_last_of_them() -> None:
    scores = torch.tensor([0.1, 0.4, 0.2, 0.1, 0.2]).log()[None]

    def kept(**changes: Any) -> list[int]:
        return truncated(scores, Sampling(**changes)).isfinite()[0].nonzero()[:, 0].tolist()

    assert kept() == kept(top_k=5) == kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == kept(top_p=0.3) == kept(top_p=1e-9) == [1]
    assert kept(top_k=2) == kept(top_k=3) == kept(top_p=0.7) == [1, 2, 4]
    assert kept(top_p=0.85) == [0, 1, 2, 3, 4]
    # Of the three that top_k keeps, the first has half the mass, which is enough for 0.49 but not for 0.51.
    assert kept(top_k=3, top_p=0.49) == [1]
    assert kept(top_k=3, top_p=0.51) == [1, 2, 4]


@pytest.mark.parametrize("family", [*FAMILIES, "bloom"])
def test_old_logps_are_the_scorers(family: str, tmp_path: Path) -> None:
    if family == "bloom":
        from tests.test_decoding import other

        other("bloom").save_pretrained(tmp_path)
        found = disturbed(PolicyReferencePair(PairSettings(str(tmp_path), temperature=0.8)))
    else:
        found = a_pair(tmp_path, family, temperature=0.8)
    for reference in (False, True):
        rollout = found.generate(ragged_batch(), 3, Sampling(15, seed=2), reference=reference)
        scores = found.score(rollout.completions)
        expected = scores.reference_token_logps if reference else scores.token_logps
        torch.testing.assert_close(rollout.old_logps, expected, atol=1e-4, rtol=1e-5)
        assert rollout.old_logps is not None
        assert (rollout.old_logps[~rollout.completions.completion_mask] == 0).all()


@pytest.mark.parametrize(("k", "p"), [(5, 1.0), (0, 0.7), (8, 0.8)])
def test_old_logps_of_truncated_draws_are_renormalised(pair: PolicyReferencePair, k: int, p: float) -> None:
    """Drawn at a temperature of its own; what may be drawn is found token by token by sorting."""
    sampling = Sampling(6, temperature=3.0, top_k=k, top_p=p, seed=4)
    rollout = pair.generate(ragged_batch(), 4, sampling)
    drawn, old = rollout.completions, rollout.old_logps
    assert old is not None
    left_out = 0
    for b, c in drawn.present.nonzero().tolist():
        prompt = drawn.prompt_ids[b][drawn.prompt_mask[b]]
        for t in range(int(drawn.lengths[b, c])):
            text = torch.cat([prompt, drawn.completion_ids[b, c, :t]])
            probability, order = next_logps(pair, text[None], 3.0)[0].exp().sort(descending=True)
            if k:
                probability, order = probability[:k] / probability[:k].sum(), order[:k]
            size = int((probability.cumsum(0) < p - 1e-12).sum()) + 1
            kept = dict(
                zip(order[:size].tolist(), (probability[:size] / probability[:size].sum()).tolist(), strict=True)
            )
            left_out += VOCABULARY - len(kept)
            assert math.isclose(math.exp(old[b, c, t]), kept[int(drawn.completion_ids[b, c, t])], rel_tol=1e-3)
    assert left_out > 0


def group(rollout: Rollout, b: int, columns: int = 3) -> list[list[int]]:
    """The tokens drawn for a prompt."""
    drawn = rollout.completions
    return [drawn.completion_ids[b, k][drawn.completion_mask[b, k]].tolist() for k in range(columns)]


def test_batch_order_padding_columns_and_budget_do_not_change_a_draw(
    pair: PolicyReferencePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, sampling = ragged_batch(), Sampling(12, seed=9)
    whole = pair.generate(prompts, 3, sampling)
    groups = [group(whole, b) for b in range(4)]
    assert len({str(some) for some in groups}) == 4
    assert whole.completions.lengths.unique().numel() > 2
    order = torch.tensor([2, 0, 3, 1])
    turned = pair.generate(prompts.rows(order), 3, sampling)
    assert [group(turned, i) for i in range(4)] == [groups[b] for b in order.tolist()]
    assert [group(pair.generate(prompts.rows(slice(b, b + 1)), 3, sampling), 0) for b in range(4)] == groups
    pad = torch.nn.functional.pad
    padded = prompts._replace(
        prompt_ids=pad(prompts.prompt_ids, (3, 4), value=7), prompt_mask=pad(prompts.prompt_mask, (3, 4))
    )
    assert [group(pair.generate(padded, 3, sampling), b) for b in range(4)] == groups
    for rows in (3, 11):
        monkeypatch.setattr("lit_align.kv_cache.ROWS", rows)
        more = pair.generate(prompts, 5, sampling._replace(max_new_tokens=20))
        shown = [[text[:12] for text in group(more, b)] for b in range(4)]
        assert shown == groups


def test_seed_and_row_decide_what_is_drawn_for_equal_prompts(pair: PolicyReferencePair) -> None:
    def texts(prompts: CompletionBatch, seed: int) -> list[list[int]]:
        return group(pair.generate(prompts, 3, Sampling(8, seed=seed)), 0)

    assert texts(one_prompt(0), 1) == texts(one_prompt(0), 1)
    assert texts(one_prompt(0), 1) != texts(one_prompt(5), 1)
    assert texts(one_prompt(0), 1) != texts(one_prompt(0), 2)


def test_a_prompt_is_read_once_and_a_completion_that_ended_no_more(
    pair: PolicyReferencePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A completion of n tokens is read n - 1 times, since nothing is predicted from its last token."""
    read: list[tuple[int, int]] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"]
        rows, width = kwargs["input_ids"].shape
        read.append((rows, rows * width if mask is None else int(mask[:, -width:].sum())))

    prompts = ragged_batch()
    with pair.base.base_model.register_forward_pre_hook(look, with_kwargs=True):
        drawn = pair.generate(prompts, 6, Sampling(20, seed=3)).completions
    assert read[0] == (4, int(prompts.prompt_mask.sum()))
    assert sum(tokens for _, tokens in read[1:]) == (drawn.lengths - 1).sum()
    assert 1 < drawn.lengths.min() + 1 < drawn.lengths.max() == 20
    # No more rows at once than the constant says, whether prompts or completions are many.
    monkeypatch.setattr("lit_align.kv_cache.ROWS", 4)
    with pair.base.base_model.register_forward_pre_hook(look, with_kwargs=True):
        read.clear()
        pair.generate(prompts, 2, Sampling(4))
        pair.generate(prompts, 8, Sampling(4))
    assert max(rows for rows, _ in read) == 4


def test_generation_leaves_no_trace(pair: PolicyReferencePair) -> None:
    """Modes part by part, the random state and the gradients are as before; what is drawn can be trained on."""
    pair.policy.train()
    pair.base.base_model.norm.eval()
    modes = [part.training for part in pair.modules()]
    seen: list[bool] = []
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    with pair.base.base_model.norm.register_forward_pre_hook(lambda module, args: seen.append(pair.policy.training)):
        rollout = pair.generate(ragged_batch(), 2, Sampling(5))
    assert not any(seen)
    assert [part.training for part in pair.modules()] == modes
    assert torch.equal(state, torch.random.get_rng_state())
    assert rollout.old_logps is not None
    assert not rollout.old_logps.requires_grad
    assert not rollout.old_logps.is_inference()
    pair.score(rollout.completions).logratio.sum().backward()
    pair.zero_grad()


def test_gradient_checkpointing_does_not_turn_the_cache_off(tmp_path: Path) -> None:
    found = a_pair(tmp_path, gradient_checkpointing=True)
    widths: list[int] = []
    with found.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    ):
        found.generate(ragged_batch(), 2, Sampling(5, temperature=3.0))
    assert widths == [11, 1, 1, 1, 1]
    assert found.policy.training


def test_rows_that_are_read_whole_draw_the_same(pair: PolicyReferencePair) -> None:
    cached = pair.generate(ragged_batch(), 3, Sampling(12, seed=5))
    pair.cached = False
    try:
        plain = pair.generate(ragged_batch(), 3, Sampling(12, seed=5))
    finally:
        pair.cached = True
    assert torch.equal(cached.completions.completion_ids, plain.completions.completion_ids)
    torch.testing.assert_close(cached.old_logps, plain.old_logps, atol=1e-5, rtol=1e-5)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    found = a_pair(tmp_path)
    next(p for p in found.parameters() if p.requires_grad).data.fill_(torch.nan)
    found.policy.train()
    with pytest.raises(UserError, match="not finite"):
        found.generate(ragged_batch(), 2, Sampling(5))
    assert found.policy.training
