from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.objectives.dpo import DPO, dpo_loss
from lit_align.objectives.tr_dpo import TRDPO
from lit_align.settings import OptimSettings, PairSettings
from tests.families import save_tiny
from tests.objectives.contract import ObjectiveContract, random_groups, train


class TestTRDPO(ObjectiveContract):
    objective = TRDPO

    def loss(self, logratio: Tensor) -> Tensor:
        return dpo_loss(logratio, beta=0.1)

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [0.0, 0.0], math.log(2)

    def test_steps_raise_the_margin(self, model: str) -> None:
        """Against the model it started from; the reference has moved along."""
        groups = self.groups(6)
        module = train(self.build(model), groups, [6], accumulate=1, max_epochs=4)
        with torch.no_grad():
            after = module.pair.score(groups, reference=False).logps  # type: ignore[union-attr]
            with module.pair.policy.disable_adapter():  # type: ignore[union-attr]
                before = module.pair.score(groups, reference=False).logps  # type: ignore[union-attr]
        gain = after - before
        assert (gain[:, 0] - gain[:, 1]).mean() > 1e-4

    def test_padding_and_the_cut_into_micro_batches_change_nothing(self, model: str) -> None:
        groups = self.groups(10)
        expected = train(self.build(model), groups, [6, 4], 1)
        found = train(self.build(model), groups, [1, 3, 2, 1, 3], 3)
        names = expected.pair.state_names()  # type: ignore[union-attr]
        assert any("reference" in name for name in names)
        state, wanted = found.state_dict(), expected.state_dict()
        for name in names:
            torch.testing.assert_close(state[f"pair.{name}"], wanted[f"pair.{name}"], atol=2e-5, rtol=1e-4, msg=name)


def build(tmp_path: Path, kind: type[AlignModule], **options: float) -> AlignModule:
    if not (tmp_path / "config.json").exists():
        save_tiny("llama", tmp_path)
    optim = OptimSettings(learning_rate=1e-2, warmup=0.0, schedule="constant")
    return kind(pair=PairSettings(str(tmp_path)), optim=optim, **options)


def delta(module: AlignModule, adapter: str) -> dict[str, Tensor]:
    """What an adapter adds to each weight: B A."""
    state = module.pair.state_dict()  # type: ignore[union-attr]
    downs = [name for name in state if f"lora_A.{adapter}" in name]
    return {name: state[name.replace("lora_A", "lora_B")] @ state[name] for name in downs}


@pytest.mark.parametrize(("alpha", "tau"), [(0.6, 1), (0.25, 2), (1.0, 2)])
def test_the_reference_is_the_average_of_weights_the_paper_names(tmp_path: Path, alpha: float, tau: int) -> None:
    """Follow the policy's weights step by step, and average them outside."""
    weights: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:  # type: ignore[no-untyped-def]
            weights.append({name: value.clone() for name, value in delta(pl_module, "default").items()})

    module = build(tmp_path, TRDPO, alpha=alpha, tau=tau)
    train(module, random_groups(15, 2), [3, 3, 3, 3, 3], 1, callbacks=[Watch()])
    expected = {name: torch.zeros_like(value) for name, value in weights[0].items()}
    for step, policy in enumerate(weights, start=1):
        if step % tau == 0:
            expected = {name: alpha * policy[name] + (1 - alpha) * value for name, value in expected.items()}
    found = delta(module, "reference")
    for name, value in expected.items():
        torch.testing.assert_close(found[name.replace("default", "reference")], value, atol=1e-6, rtol=1e-5)
    assert max(value.abs().max() for value in expected.values()) > 1e-3


def test_a_reference_that_stays_is_dpo(tmp_path: Path) -> None:
    groups = random_groups(8, 2)
    plain = train(build(tmp_path, DPO, beta=0.3), groups, [4, 4], 1)
    ours = train(build(tmp_path, TRDPO, beta=0.3, alpha=0.0), groups, [4, 4], 1)
    for name, value in delta(plain, "default").items():
        torch.testing.assert_close(delta(ours, "default")[name], value, atol=1e-6, rtol=1e-5)


def test_a_resumed_run_has_the_same_reference(tmp_path: Path) -> None:
    groups = random_groups(6, 2)
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", save_top_k=-1, filename="{epoch}")
    whole = train(build(tmp_path, TRDPO), groups, [3, 3], 1, max_epochs=2, callbacks=[saver], enable_checkpointing=True)
    resumed = build(tmp_path, TRDPO)
    train(
        resumed, groups, [3, 3], 1, max_epochs=2, same_start=False, ckpt_path=str(tmp_path / "saved" / "epoch=0.ckpt")
    )
    for adapter in ("default", "reference"):
        for name, value in delta(whole, adapter).items():
            assert torch.equal(delta(resumed, adapter)[name], value)


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("alpha", 1.5), ("alpha", -0.1), ("tau", 0)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.{name} is {value}"):
        TRDPO(**{name: value})


class Faulty(TRDPO):
    """The second micro-batch has no finite loss, so its step is skipped."""

    def loss(self, batch: CompletionBatch) -> Loss:
        found = super().loss(batch)
        return found._replace(value=found.value * math.nan) if 3 in batch.row else found


def test_a_skipped_step_puts_off_the_update_and_does_not_cost_it(tmp_path: Path) -> None:
    moves: list[int] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:  # type: ignore[no-untyped-def]
            moves.append(int(pl_module.waited))

    module = build(tmp_path, Faulty, alpha=1.0, tau=2)
    groups = random_groups(15, 2)
    groups = groups._replace(row=torch.arange(15))
    train(module, groups, [3, 3, 3, 3, 3], 1, callbacks=[Watch()], default_root_dir=tmp_path)
    assert moves == [1, 1, 0, 1, 0]  # after the steps 3 and 5, of which the second was skipped
