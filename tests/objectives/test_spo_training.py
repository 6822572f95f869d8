"""SPO in training: cut into micro-batches and ranks, resumed, and on data that does not suit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.data import MixedData, PreferenceData
from lit_align.errors import UserError
from lit_align.objectives.dpo import DPO
from lit_align.objectives.spo import SPO
from lit_align.settings import PairSettings
from tests.data.conftest import pair_rows, write_jsonl
from tests.objectives.beside import OPTIM, build, byte_model, mixed
from tests.objectives.contract import random_groups, train
from tests.test_module import KeepState


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_model(tmp_path_factory.mktemp("tiny"))


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
    runner = Trainer(
        **fixed,
        **{"max_epochs": 2, "log_every_n_steps": 1, "enable_checkpointing": False, **trainer},
        callbacks=callbacks,
    )
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
