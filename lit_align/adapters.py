"""The adapters of a pair: the policy's, and a reference's own where the reference is not the bare base."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lit_align.errors import UserError
from lit_align.lora import add_in_place
from lit_align.settings import PairSettings

POLICY = "default"
REFERENCE = "reference"
START = "start"
"""The reference that training began with, where the reference moves."""


def adapted(base: Any, settings: PairSettings) -> Any:
    """The base with its trained adapter, and a frozen copy of it where one is given to start from."""
    saved = settings.lora.adapter
    model = _fresh(base, settings) if saved is None else _saved(base, settings, saved)
    add_in_place(model)
    return model


def _fresh(base: Any, settings: PairSettings) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    lora = settings.lora
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules
    )
    linear = sorted({name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear)})
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise UserError(
            f"model.pair.lora.target_modules={lora.target_modules!r} does not fit {settings.model} ({error}); "
            f"its linear layers are {', '.join(linear)}, and all-linear takes every one but the head"
        ) from error


def _saved(base: Any, settings: PairSettings, saved: str) -> Any:
    from peft import PeftModel

    folder = Path(saved)
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"model.pair.lora.adapter={saved}: the folder holds no adapter_model.safetensors "
            "(pickled adapters are refused: save it again with safe_serialization=True)"
        )
    try:
        model = PeftModel.from_pretrained(base, saved, adapter_name=POLICY, is_trainable=True)
        model.load_adapter(saved, adapter_name=REFERENCE, is_trainable=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.pair.lora.adapter={saved} is no adapter for {settings.model}: {error}") from error
    model.set_adapter(POLICY)
    for name, module in model.named_modules():
        if "lora_dropout" in name and isinstance(module, nn.Dropout):
            module.p = 0.0  # policy and reference must be the same function at the start
    return model


@contextmanager
def bare(model: Any) -> Iterator[None]:
    """Within this context the base computes alone.

    peft's own context looks at every layer twice more, to warn of a state that does not occur here, and takes three
    times as long, which is a few milliseconds of every step.

    Args:
        model: A peft model with one adapter, which is trained.
    """
    model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()


@contextmanager
def active(model: Any, name: str) -> Iterator[None]:
    """Within this context another adapter is active; what was trained before is trained afterwards.

    Args:
        model: A peft model.
        name: The adapter.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = model.active_adapter
    model.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(before, inference_mode=True)
        for parameter in trained:  # set_adapter decides on requires_grad by itself
            parameter.requires_grad_(True)


def factors(model: Any, other: str = REFERENCE) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Name of each factor of the policy's adapter, the factor, and that of another adapter, the reference's."""
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if f".{POLICY}." in name:
            yield name, parameter, named[name.replace(f".{POLICY}.", f".{other}.")]


def free_reference(model: Any, averaged: bool) -> None:
    """Give the reference an adapter of its own, and keep another one as it is; both equal to the policy's start.

    Args:
        model: A peft model before its first update.
        averaged: Freeze the policy's A and share it, so that averaging B averages the weights B·A.
    """
    for adapter in (REFERENCE, START):
        if adapter not in model.peft_config:
            model.add_adapter(adapter, copy.deepcopy(model.peft_config[POLICY]))
        for name, policy, own in factors(model, adapter):
            own.requires_grad_(False)
            own.data.copy_(policy.data)
            policy.requires_grad_(not (averaged and "lora_A" in name))


def held_base(adapter: Path) -> dict[str, Any]:
    """How training held the base of an adapter, as ``base.json`` in its folder says; empty where there is none."""
    place = adapter / "base.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}


def as_held(settings: PairSettings, adapter: Path) -> PairSettings:
    """Settings with the type and quantization of an adapter's training, where "auto" may mean others here.

    Args:
        settings: Of the base.
        adapter: The folder of the adapter.
    """
    held = held_base(adapter)
    auto = [name for name in ("dtype", "quantization") if getattr(settings, name) == "auto" and name in held]
    return replace(settings, **{name: held[name] for name in auto})
