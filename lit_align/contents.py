"""What a checkpoint holds of a module: all that training changes, the settings that give it meaning, never the base."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lit_align.errors import UserError

if TYPE_CHECKING:
    from lit_align.module import AlignModule

SETTINGS = "lit_align"
"""Key of a checkpoint under which the settings stand that its tensors depend on."""


def keep_trained(module: AlignModule, checkpoint: dict[str, Any]) -> None:
    """Take the base out of a checkpoint, and put the settings in.

    Args:
        module: Whose checkpoint it is.
        checkpoint: As Lightning hands it out; changed in place.
    """
    trained, state = _trained(module), checkpoint["state_dict"]
    checkpoint[SETTINGS] = _settings(module)
    checkpoint["state_dict"] = {
        name: value for name, value in state.items() if not name.startswith("pair.") or name in trained
    }


def check_fit(module: AlignModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other settings, or one that does not hold all that is trained.

    Args:
        module: What is to go on.
        checkpoint: As it was read.

    Raises:
        UserError: If a setting differs, with both values; if tensors are missing or have another shape, with the
            first of them.
    """
    check_settings(checkpoint.get(SETTINGS, {}), _settings(module))
    check_tensors(checkpoint["state_dict"], module.state_dict(keep_vars=True), _trained(module))


def check_settings(found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """A checkpoint means the same under the settings of this run.

    Args:
        found: Settings that stand in the checkpoint.
        own: Those of the run.

    Raises:
        UserError: If one differs, with both values.
    """
    for name, value in own.items():
        if name in found and found[name] != value:
            raise UserError(
                f"the checkpoint was made with {name} {found[name]}, and this run has {value}: its tensors would mean "
                f"something else; set {name} as it was, or start without the checkpoint"
            )


def check_tensors(found: Mapping[str, Tensor], own: Mapping[str, Tensor], trained: Collection[str]) -> None:
    """A checkpoint holds all that is trained.

    Args:
        found: The checkpoint's state.
        own: The module's.
        trained: Names in it of what is trained.

    Raises:
        UserError: If tensors are missing or have another shape, with the first of them.
    """
    wrong = sorted(key for key in trained if key not in found or found[key].shape != own[key].shape)
    if wrong:
        raise UserError(
            f"the checkpoint does not fit this model: {len(wrong)} of {len(trained)} trained tensors are missing "
            f"or of another shape, the first is {wrong[0]}; use the objective, model and lora settings it was made with"
        )


def _settings(module: AlignModule) -> dict[str, Any]:
    """What gives the trained tensors their meaning."""
    pair = module.pair_settings
    return {
        "model": pair.model,
        "model.pair.lora.alpha": pair.lora.alpha,
        "model.pair.temperature": pair.temperature,
        "objective": type(module).__name__,
        "model.pair.quantization": pair.quantization,
    }


def _trained(module: AlignModule) -> set[str]:
    """Names of what a checkpoint must hold: of the pair its adapters, and all that stands beside it."""
    if module.pair is None:
        return set()
    beside = {name for name in module.state_dict(keep_vars=True) if not name.startswith("pair.")}
    return beside | {f"pair.{name}" for name in module.pair.state_names()}
