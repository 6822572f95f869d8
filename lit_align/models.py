"""Loading a causal language model and its tokenizer: a local folder, a Hub name or the embedded default.

transformers, peft and bitsandbytes are imported inside functions: `--help` and `--print_config` need none of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_align.assets import resolve
from lit_align.errors import UserError
from lit_align.logprobs import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

QUANTIZE_ABOVE = 100_000_000
"""Parameters from which ``quantization: auto`` uses NF4 on a GPU; below, activations outweigh the base."""

TREE_FAMILIES = frozenset(
    {"llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "phi3", "mistral", "gemma2", "gemma", "granite", "cohere", "olmo2"}
)
"""``model_type`` of the families whose tree rows are proven equal to one row per completion by the tests."""


@dataclass
class LoraSettings:
    """The trained adapter.

    Attributes:
        r: Rank, >= 1.
        alpha: The update is scaled by alpha / r, > 0.
        target_modules: Names of the linear layers that get an adapter, or "all-linear" (never the output head).
        adapter: A saved adapter to start from, such as the result of supervised fine-tuning. It is then the
            reference as well, frozen; ``r``, ``alpha`` and ``target_modules`` come from it.
    """

    r: int = 16
    alpha: int = 32
    target_modules: str | list[str] = "all-linear"
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"model.pair.lora.r is {self.r}; it must be 1 or more (16 is usual)")
        if self.alpha <= 0:
            raise UserError(
                f"model.pair.lora.alpha is {self.alpha}; it must be greater than 0 (twice the rank is usual)"
            )


@dataclass
class PairSettings:
    """Which model is trained against itself, and how it is held in memory.

    Attributes:
        model: Local folder or Hub name of a causal language model, or "stories", the small model that comes along.
        dtype: Type of the base's weights and computations; "auto" is bfloat16 on a GPU and float32 on a CPU.
        quantization: "nf4" or "int8" by bitsandbytes, or "none"; "auto" is nf4 on a GPU for models of more than 100
            million parameters and none elsewhere.
        lora: The adapter.
        temperature: Divides the logits of both models in training, sampling and KL alike, > 0.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run Python code that comes with the model; needs a pinned ``revision``.
    """

    model: str = "stories"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["auto", "none", "nf4", "int8"] = "auto"
    lora: LoraSettings = field(default_factory=LoraSettings)
    temperature: float = 1.0
    gradient_checkpointing: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"model.pair.temperature is {self.temperature}; it must be greater than 0 (1 is usual)")
        if self.trust_remote_code and not self.revision:
            raise UserError(
                "model.pair.trust_remote_code runs code from the model's repository, so it needs a fixed version: "
                "set model.pair.revision to a commit hash"
            )
        if self.quantization in {"nf4", "int8"} and find_spec("bitsandbytes") is None:
            raise UserError(
                f"model.pair.quantization is {self.quantization}, which needs bitsandbytes, and that is not installed: "
                "`pip install bitsandbytes`, or set model.pair.quantization=none"
            )

    @property
    def source(self) -> str:
        """What transformers loads from: a folder or a Hub name."""
        return resolve(self.model)

    def hub_options(self) -> dict[str, Any]:
        """Keyword arguments of every ``from_pretrained`` call."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}


def load_tokenizer(settings: PairSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: If there is none to load, or it knows no end of sequence.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.source, **settings.hub_options())
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(settings, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {settings.model} has no end-of-sequence token, so completions could not learn to end; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def load_base(settings: PairSettings, device: torch.device) -> PreTrainedModel:
    """The frozen base model on ``device``, in eval mode, every dropout 0.

    Raises:
        UserError: If the model cannot be found or is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(settings.source, **settings.hub_options())
        _silence_dropout(config)
        model = AutoModelForCausalLM.from_pretrained(
            settings.source,
            config=config,
            dtype=_dtype(settings, device),
            quantization_config=_quantization(settings, config, device),
            attn_implementation=_attention(config),
            device_map={"": device},
            use_safetensors=True,
            **settings.hub_options(),
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(settings, "model", error) from error
    # Of a model's own sampling habits only its end of sequence stays.
    model.generation_config = GenerationConfig(eos_token_id=getattr(model.generation_config, "eos_token_id", None))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # A pass without gradient would repack the 4-bit weights for a CPU kernel that has no backward.
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    return model.eval().requires_grad_(False)


def head_of(model: PreTrainedModel, temperature: float) -> Head:
    """The vocabulary head of a causal language model, with the scale and soft cap its config names.

    Raises:
        UserError: If the output layer is adapted, trained or quantized: the scorer keeps it frozen and plain.
    """
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.requires_grad or hasattr(layer, "base_layer"):
        raise UserError(
            f"the output head of {type(model).__name__} is adapted, trained or quantized; lit_align keeps it frozen: "
            "leave lm_head out of model.pair.lora.target_modules and out of the quantization"
        )
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(
        weight=weight,
        bias=getattr(layer, "bias", None),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
        temperature=temperature,
    )


def stop_ids(model: PreTrainedModel, eos_token_id: int | None) -> list[int]:
    """The ids that end a completion: the tokenizer's end of sequence and those of the model's generation config."""
    own = model.generation_config.eos_token_id
    found = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({*found, *([] if eos_token_id is None else [eos_token_id])})


def shares_prompts(config: Any) -> bool:
    """Whether tree rows are exact for this model; says in the log what happens otherwise."""
    if config.model_type in TREE_FAMILIES:
        return True
    log.warning(
        "shared prompts are not proven exact for %s models: each completion gets a row of its own, which is slower",
        config.model_type,
    )
    return False


def _attention(config: Any) -> str | None:
    """Tree masks need sdpa or eager, soft-capped attention scores need eager; other models choose themselves."""
    if config.model_type not in TREE_FAMILIES:
        return None
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def _silence_dropout(config: Any) -> None:
    """Set every dropout to 0: policy and reference must be the same function at the start, in train mode too."""
    for name, value in list(vars(config).items()):
        if (name.endswith(("dropout", "pdrop", "drop"))) and isinstance(value, int | float):
            setattr(config, name, 0.0)


def _dtype(settings: PairSettings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, settings.dtype)


def _quantization(settings: PairSettings, config: Any, device: torch.device) -> Any:
    kind = settings.quantization
    if kind == "auto":
        kind = "nf4" if device.type == "cuda" and _parameters(config) > QUANTIZE_ABOVE else "none"
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
        bnb_4bit_compute_dtype=_dtype(settings, device),
    )


def _parameters(config: Any) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def _unloadable(settings: PairSettings, what: str, error: Exception) -> UserError:
    """Say where the model was looked for; the library's own words come last."""
    path = Path(settings.source)
    if path.is_dir():
        place = f"the folder {path} holds no usable {what}"
    elif path.is_absolute() or settings.model.startswith((".", "~")):
        place = f"there is no folder {path}"
    else:
        place = f"{settings.model} is no local folder, and the Hub did not deliver a {what} of that name"
    detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"model.pair.model={settings.model}: {place}. Give a folder with safetensors weights, a Hub name such as "
        f"Qwen/Qwen2.5-0.5B-Instruct, or stories. ({detail})"
    )
