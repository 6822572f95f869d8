"""In which type a base is held and computes, and whether it is quantized."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from lit_align.settings import PairSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

QUANTIZE_ABOVE = 100_000_000
"""Parameters from which ``quantization: auto`` uses NF4 on a GPU; below, activations outweigh the base."""


def dtype_of(settings: PairSettings, device: torch.device) -> torch.dtype:
    """The type of the base's weights and computations on a device."""
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, settings.dtype)


def quantization_config(settings: PairSettings, config: Any, device: torch.device) -> Any:
    """What transformers loads the base with, or None for a base that is not quantized here."""
    kind = quantization_of(settings, config, device)
    if settings.quantization == "auto":
        log.info("quantization: auto is %s for %s on %s", kind, settings.model, device.type)
    if kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_of(settings, device),
    )


def quantization_of(settings: PairSettings, config: Any, device: torch.device) -> str:
    """none, nf4 or int8: what the user chose, or what suits model and device."""
    if settings.quantization != "auto":
        return settings.quantization
    if device.type != "cuda" or getattr(config, "quantization_config", None) is not None:
        return "none"
    parameters = sum(parameter.numel() for parameter in empty_model(config, settings).parameters())
    return "none" if parameters <= QUANTIZE_ABOVE else "nf4"


def empty_model(config: Any, settings: PairSettings, **options: Any) -> PreTrainedModel:
    """A causal language model on the meta device: shapes without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code, **options)
