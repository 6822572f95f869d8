"""LoRA layers whose update is added to the base layer's output in place."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def add_in_place(model: Any) -> None:
    """Spare the plain linear layers of a peft model the passes over memory that scale and add the update.

    What they compute stays peft's: x Wᵀ + s (x Aᵀ) Bᵀ with s = alpha / r, here as one matrix product that accumulates.

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
    flat, base = x.flatten(0, -2), layer.base_layer
    down = layer.lora_A[name](layer.lora_dropout[name](flat))
    up = layer.lora_B[name].weight.t()
    # What is changed in place must be no view, or autograd copies it; Conv1D's own forward returns one.
    out = base(flat) if type(base) is nn.Linear else torch.addmm(base.bias, flat, base.weight)
    out = out.addmm_(down, up, alpha=layer.scaling[name])
    return out.view(*x.shape[:-1], out.shape[-1])


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
