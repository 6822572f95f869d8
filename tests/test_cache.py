"""The reference cache: what it spares, what it must never take for the same, and that nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file

from lit_align.batch import CompletionBatch
from lit_align.cache import ReferenceCache, fingerprint
from lit_align.caches import root
from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.objectives.dpo import DPO
from lit_align.objectives.eps_dpo import EpsilonDPO
from lit_align.objectives.ipo import IPO
from lit_align.objectives.tr_dpo import TRDPO
from lit_align.pair import PolicyReferencePair
from lit_align.settings import LoraSettings, OptimSettings, PairSettings
from tests.families import ragged_batch, save_tiny
from tests.objectives.contract import random_groups, train
from tests.test_pair import disturbed


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by one entry for each pass through a model: whether it was the reference's."""
    found: list[bool] = []
    hidden = PolicyReferencePair._hidden

    def count(self: PolicyReferencePair, *args: Any) -> Any:
        found.append(not torch.is_grad_enabled())
        return hidden(self, *args)

    monkeypatch.setattr(PolicyReferencePair, "_hidden", count)
    return found


@pytest.fixture
def model(tmp_path: Path) -> str:
    return save_tiny("llama", tmp_path / "base")


def pair_of(model: str, tmp_path: Path, **settings: Any) -> PolicyReferencePair:
    return disturbed(PolicyReferencePair(PairSettings(model, reference_cache=str(tmp_path / "cache"), **settings)))


def test_known_completions_need_no_reference_pass_whatever_batch_they_come_in(
    model: str, tmp_path: Path, passes: list[bool]
) -> None:
    batch = ragged_batch()
    live = pair_of(model, tmp_path).score(batch, recurring=True)
    assert passes == [True, False]
    pair = pair_of(model, tmp_path)
    order = torch.tensor([2, 0, 3, 1])
    wider = torch.nn.functional.pad
    padded = batch._replace(
        prompt_ids=wider(batch.prompt_ids, (3, 2), value=9),
        prompt_mask=wider(batch.prompt_mask, (3, 2)),
        completion_ids=wider(batch.completion_ids, (0, 4), value=9),
        completion_mask=wider(batch.completion_mask, (0, 4)),
    )
    passes.clear()
    found = pair.score(batch.rows(order), recurring=True)
    again = pair.score(padded, recurring=True)
    alone = [pair.score(batch.rows(slice(b, b + 1)), recurring=True) for b in range(4)]
    assert not any(passes)
    assert torch.equal(found.reference_token_logps, live.reference_token_logps[order])
    assert torch.equal(again.reference_token_logps[..., :13], live.reference_token_logps)
    assert torch.equal(torch.cat([part.reference_token_logps for part in alone]), live.reference_token_logps)
    torch.testing.assert_close(found.logratio, live.logratio[order], atol=1e-5, rtol=1e-5)


def test_one_unknown_completion_runs_the_reference_on_the_batch(model: str, tmp_path: Path, passes: list[bool]) -> None:
    batch, pair = ragged_batch(), pair_of(model, tmp_path)
    pair.score(batch.rows(slice(0, 3)), recurring=True)
    passes.clear()
    scores = pair.score(batch, recurring=True)
    assert passes == [True, False]
    plain = disturbed(PolicyReferencePair(PairSettings(model))).score(batch)
    assert torch.equal(scores.reference_token_logps, plain.reference_token_logps)


@pytest.mark.parametrize("asked", [{"kl": True}, {"epsilon": 0.1}, {"recurring": False}])
def test_the_cache_is_not_read_where_log_probs_are_not_enough_or_completions_fresh(
    model: str, tmp_path: Path, passes: list[bool], asked: dict[str, Any]
) -> None:
    pair = pair_of(model, tmp_path)
    pair.score(ragged_batch(), recurring=True)
    passes.clear()
    pair.score(ragged_batch(), **{"recurring": True, **asked})
    assert passes == [True, False]


def test_fresh_completions_and_a_moving_reference_leave_nothing_behind(
    model: str, tmp_path: Path, passes: list[bool]
) -> None:
    pair_of(model, tmp_path).score(ragged_batch())
    pair = pair_of(model, tmp_path)
    pair.let_reference_move(averaged=False)
    for _ in range(2):
        pair.score(ragged_batch(), recurring=True)
        pair.update_reference(0.5)
    assert passes == [True, False] * 3
    assert not (tmp_path / "cache").exists()


def changed(batch: CompletionBatch, name: str, *place: int) -> CompletionBatch:
    """Another token at one place."""
    ids = getattr(batch, name).clone()
    ids[place] = 60 - ids[place]
    return batch._replace(**{name: ids})


def shifted(batch: CompletionBatch) -> CompletionBatch:
    """The same tokens, the last one of the prompt now the first of the completion."""
    ids, mask = batch.completion_ids[:1, :1, :6], batch.completion_mask[:1, :1, :6]
    assert mask.all()
    first = batch.prompt_ids[:1, 6:7, None]
    return batch.rows(slice(0, 1))._replace(
        prompt_ids=batch.prompt_ids[:1, :6],
        prompt_mask=batch.prompt_mask[:1, :6],
        completion_ids=torch.cat([first, ids], -1),
        completion_mask=torch.ones(1, 1, 7, dtype=torch.bool),
        present=batch.present[:1, :1],
    )


def without(batch: CompletionBatch, name: str, *place: Any) -> CompletionBatch:
    mask = getattr(batch, name).clone()
    mask[place] = False
    return batch._replace(**{name: mask})


OTHER_TEXT: dict[str, Callable[[CompletionBatch], CompletionBatch]] = {
    "a token of the prompt": lambda batch: changed(batch, "prompt_ids", 2, 0),
    "a token of a completion": lambda batch: changed(batch, "completion_ids", 1, 0, 11),
    "a prompt cut on the left": lambda batch: without(batch, "prompt_mask", 0, 0),
    "a completion cut on the right": lambda batch: without(batch, "completion_mask", 0, 1, 8),
    "the border of prompt and completion": shifted,
}


@pytest.mark.parametrize("other", OTHER_TEXT.values(), ids=OTHER_TEXT.keys())
def test_other_tokens_are_not_taken_for_known_ones(
    model: str, tmp_path: Path, passes: list[bool], other: Callable[[CompletionBatch], CompletionBatch]
) -> None:
    pair = pair_of(model, tmp_path)
    pair.score(ragged_batch(), recurring=True)
    passes.clear()
    pair.score(other(ragged_batch()), recurring=True)
    assert passes == [True, False]


def reference_of(model: str, temperature: float = 1.0, **settings: Any) -> dict[str, Any]:
    return fingerprint(PolicyReferencePair(PairSettings(model, **settings)).policy, temperature)


def adapter(model: str, folder: Path, seed: int) -> LoraSettings:
    disturbed(PolicyReferencePair(PairSettings(model)), seed).save_adapter(folder)
    return LoraSettings(adapter=str(folder))


def test_the_policys_adapter_and_the_models_place_do_not_matter(model: str, tmp_path: Path) -> None:
    known = reference_of(model)
    assert reference_of(save_tiny("llama", tmp_path / "elsewhere")) == known
    assert reference_of(model, lora=LoraSettings(r=4, alpha=3, target_modules=["q_proj"])) == known
    assert reference_of(model, gradient_checkpointing=True) == known
    scored = PolicyReferencePair(PairSettings(model))
    disturbed(scored).score(ragged_batch())
    assert fingerprint(scored.policy, 1.0) == known
    start = adapter(model, tmp_path / "sft", 3)
    again = adapter(model, tmp_path / "copy", 3)
    assert reference_of(model, lora=start) == reference_of(model, lora=again)


def test_whatever_else_changes_the_reference_is_another_one(model: str, tmp_path: Path) -> None:
    found = [reference_of(model), reference_of(model, temperature=0.7)]
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for number, name in enumerate(sorted(weights)[::6]):  # one number in a tensor of each kind
        other = save_tiny("llama", tmp_path / f"other{number}")
        value = weights[name].clone()
        value.view(-1)[-1] += 0.01
        save_file({**weights, name: value}, tmp_path / f"other{number}" / "model.safetensors", {"format": "pt"})
        found.append(reference_of(other))
    found.append(reference_of(save_tiny("llama", tmp_path / "theta", rms_norm_eps=1e-4)))
    found += [reference_of(model, lora=adapter(model, tmp_path / f"sft{seed}", seed)) for seed in (3, 4)]
    scaled = tmp_path / "sft4" / "adapter_config.json"
    scaled.write_text(scaled.read_text().replace('"lora_alpha": 32', '"lora_alpha": 16'))
    found.append(reference_of(model, lora=LoraSettings(adapter=str(tmp_path / "sft4"))))
    assert len({str(one) for one in found}) == len(found)


def test_a_quantized_reference_is_another_one_and_the_same_when_loaded_again(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path, hidden_size=64, intermediate_size=128)
    nf4 = reference_of(model, quantization="nf4")
    assert nf4 == reference_of(model, quantization="nf4", lora=LoraSettings(r=2))
    assert nf4["weights"] != reference_of(model)["weights"]


def fit(model: str, cache: Any, kind: type[AlignModule] = DPO, lr: float = 1e-2, **options: Any) -> list[float]:
    """Losses of two epochs."""
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
            losses.append(float(outputs["loss"]))

    lora = options.pop("lora", LoraSettings())
    module = kind(
        pair=PairSettings(model, lora=lora, reference_cache=cache),
        optim=OptimSettings(learning_rate=lr, warmup=0.0, schedule="constant"),
        **options,
    )
    groups = random_groups(11, 2)
    train(module, groups, [4, 4, 3], 1, max_epochs=2, log_every_n_steps=100, callbacks=[Losses()])
    return losses


OTHER_RUNS: dict[str, dict[str, Any]] = {
    "learning rate": {"lr": 3e-3},
    "beta": {"beta": 0.5},
    "rank": {"lora": LoraSettings(r=3)},
    "objective": {"kind": IPO},
}


@pytest.mark.parametrize("options", OTHER_RUNS.values(), ids=OTHER_RUNS.keys())
def test_a_second_run_does_without_the_reference_and_has_the_same_losses(
    model: str, tmp_path: Path, passes: list[bool], options: dict[str, Any]
) -> None:
    cache = str(tmp_path / "cache")
    fit(model, cache)
    assert sum(passes) == 3  # the second epoch finds what the first has put there
    passes.clear()
    found = fit(model, cache, **options)
    assert len(passes) == 6
    assert not any(passes)
    assert found == pytest.approx(fit(model, False, **options), abs=1e-5)


def test_what_epsilon_dpo_computes_serves_others_and_tr_dpo_takes_nothing(
    model: str, tmp_path: Path, passes: list[bool]
) -> None:
    cache = str(tmp_path / "cache")
    fit(model, cache, EpsilonDPO)
    assert sum(passes) == 6
    passes.clear()
    fit(model, cache)
    assert not any(passes)
    fit(model, cache, TRDPO)
    assert sum(passes) == 6


def test_steps_that_show_the_kl_run_the_reference(model: str, tmp_path: Path, passes: list[bool]) -> None:
    module = DPO(pair=PairSettings(model, reference_cache=str(tmp_path / "cache")))
    train(module, random_groups(12, 2), [4, 4, 4], 1, max_epochs=2, log_every_n_steps=2)
    assert passes == [True, False] * 4 + [False] + [True, False]  # the fifth of six steps is known and not logged


def test_a_cache_that_holds_something_else_stops_the_run(model: str, tmp_path: Path) -> None:
    class Off(PolicyReferencePair):
        def _hidden(self, *args: Any) -> Any:
            return super()._hidden(*args) + (0.0 if torch.is_grad_enabled() else 1e-3)

    groups, settings = random_groups(4, 2), PairSettings(model, reference_cache=str(tmp_path / "cache"))
    Off(settings).score(groups, recurring=True)
    with pytest.raises(UserError, match=r"may differ by 1e-04.*or its reference cache is damaged"):
        train(DPO(pair=settings), groups, [4], 1, log_every_n_steps=100)


def test_the_first_loss_is_ln_2_to_rounding(model: str, tmp_path: Path) -> None:
    fit(model, str(tmp_path / "cache"))
    assert fit(model, str(tmp_path / "cache"))[0] == pytest.approx(4 * math.log(2), abs=1e-5)


def test_types_that_depend_on_the_batch_are_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not go with dtype bfloat16.*dtype=float32"):
        PairSettings(reference_cache=True, dtype="bfloat16")
    with pytest.raises(UserError, match=r"does not go with quantization int8"):
        PairSettings(reference_cache=True, quantization="int8")
    settings = PairSettings(model, reference_cache=True)
    with pytest.raises(UserError, match=r"trainer.precision=bf16-mixed"):
        train(DPO(pair=settings), random_groups(4, 2), [4], 1, precision="bf16-mixed")
    pair = PolicyReferencePair(PairSettings(model, dtype="bfloat16"))
    with pytest.raises(UserError, match=r"does not go with dtype bfloat16"):  # what "auto" is on a GPU shows on loading
        ReferenceCache(settings, pair.policy)


def test_the_folder_is_the_one_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LIT_ALIGN_CACHE", raising=False)
    assert root(True) == tmp_path / ".cache" / "lit_align"
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "here"))
    assert root(True) == tmp_path / "here"
    assert root("~/there") == tmp_path / "there"
