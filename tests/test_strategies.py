"""Ranks that share one frozen base train as one rank that has it all."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from lit_align.errors import UserError
from lit_align.objectives import RewardModel
from lit_align.objectives.eps_dpo import EpsilonDPO
from lit_align.settings import OptimSettings, PairSettings
from lit_align.strategies import ShardedBase, shard_layers
from tests.families import save_tiny, tiny
from tests.objectives.contract import random_groups, train


class Keep(Callback):
    """Writes what rank 0 has learned, and which of the base's weights were cut, to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        learned = {name: value.detach() for name, value in pl_module.named_parameters() if value.requires_grad}
        base = {name: value for name, value in pl_module.named_parameters() if "lora_" not in name}
        cut = [name for name, value in base.items() if isinstance(value, DTensor)]
        if trainer.is_global_zero:
            learned["beta"] = pl_module.beta.clone()  # type: ignore[union-attr,operator]
            torch.save({"learned": learned, "cut": cut, "whole": sorted(set(base) - set(cut))}, self.path)


class Local(EpsilonDPO):
    """Processes started by spawn send their state back when they end, which shards cannot; those of ``fit`` do not."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not isinstance(value, DTensor)}


def learn(tmp_path: Path, name: str, quantization: Any, accumulate: int, **options: Any) -> dict[str, Any]:
    """Four optimizer steps of 8 groups in all, of uneven micro-batches."""
    model = tmp_path / "model"
    if not model.exists():
        save_tiny("llama", model)
    optim = OptimSettings(learning_rate=1e-2, warmup=0.0, schedule="constant")
    module = Local(0.2, 0.1, PairSettings(str(model), quantization=quantization), optim)
    sizes = [4, 1, 2, 5, 6, 4, 1, 1]
    train(module, random_groups(24, 2), sizes, accumulate, callbacks=[Keep(tmp_path / name)], **options)
    return torch.load(tmp_path / name)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_two_ranks_that_share_the_base_train_as_one(tmp_path: Path, quantization: str) -> None:
    if quantization == "nf4" and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    one = learn(tmp_path, "one", quantization, 2)
    two = learn(tmp_path, "two", quantization, 1, strategy=ShardedBase(start_method="spawn"), devices=2)
    assert one["cut"] == []
    assert any("q_proj" in name for name in two["cut"])
    assert all(
        "embed_tokens" in name or "lm_head" in name or name.endswith("model.norm.weight") for name in two["whole"]
    )
    assert one["learned"].keys() == two["learned"].keys()
    for name, value in one["learned"].items():
        torch.testing.assert_close(two["learned"][name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert one["learned"]["beta"] != 0.2


def test_a_model_whose_layers_are_not_known_is_refused() -> None:
    model = tiny("llama")
    model._no_split_modules = None
    with pytest.raises(UserError, match=r"--trainer\.strategy ddp"):
        shard_layers(model, "cpu", 1)


@pytest.mark.parametrize(
    ("data", "cache", "message"),
    [
        (SimpleNamespace(sampling=None), False, "draw completions of its own"),
        (SimpleNamespace(), True, "reference_cache"),
        (SimpleNamespace(), False, "RewardModel judges the validation completions"),
    ],
)
def test_what_would_have_ranks_run_the_base_unequally_often_is_refused(data: Any, cache: bool, message: str) -> None:
    strategy, settings = ShardedBase(), PairSettings(dtype="float32", quantization="none", reference_cache=cache)
    strategy._lightning_module = RewardModel(pair=settings)
    strategy._lightning_module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    with pytest.raises(UserError, match=message):
        strategy.model_to_device()
