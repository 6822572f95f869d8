"""LoRA layers whose update is added to the base layer's output in place."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def add_in_place(model: Any) -> None:
    """Spare the plain linear layers of a peft model the passes over memory that scale and add the update.

    What they compute stays peft's: x Wᵀ + s (x Aᵀ) Bᵀ with s = alpha / r, here as one matrix product that accumulates,
    or at full rank as x (W + s B A)ᵀ.

    Args:
        model: A peft model; quantized layers and other kinds of adapters are left alone.
    """
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D

    for layer in model.modules():
        if type(layer) is Linear and type(layer.base_layer) in (nn.Linear, Conv1D):
            layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = layer.active_adapters
    name = names[0] if names else ""
    if (
        args
        or kwargs
        or layer.disable_adapters
        or layer.merged
        or len(names) != 1
        or name not in layer.lora_A
        or name in layer.lora_variant
        or layer.lora_bias[name]
        or x.dtype != layer.lora_A[name].weight.dtype
        or x.dtype != layer.base_layer.weight.dtype
        or _autocasts(x.device.type)
    ):
        return type(layer).forward(layer, x, *args, **kwargs)
    flat, base, scale = x.flatten(0, -2), layer.base_layer, layer.scaling[name]
    down, up, dropout = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_dropout[name]
    weight = base.weight.t() if type(base) is nn.Linear else base.weight
    if _sums_first(weight, len(down)) and isinstance(dropout, nn.Identity):
        # Laid out as the weight itself, so that with an update of zero the product is the very one of the base.
        if type(base) is nn.Linear:
            out = nn.functional.linear(flat, torch.addmm(base.weight, up, down, alpha=scale), base.bias)
        else:
            out = torch.addmm(base.bias, flat, torch.addmm(weight, down.t(), up.t(), alpha=scale))
    else:
        # What is changed in place must be no view, or autograd copies it; Conv1D's own forward returns one.
        out = base(flat) if type(base) is nn.Linear else torch.addmm(base.bias, flat, weight)
        out = out.addmm_(nn.functional.linear(dropout(flat), down), up.t(), alpha=scale)
    return out.view(*x.shape[:-1], out.shape[-1])


def _sums_first(weight: Tensor, rank: int) -> bool:
    """Whether to add the update to the weight: an adapter of full rank takes longer to apply beside it.

    Not in 16 bits, where a small update would be rounded away, and not on a GPU, where it is not known that a product
    with an update of zero has the very bits of one without.
    """
    sound = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    return sound and rank >= min(weight.shape)


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
