"""Loading a causal language model and its tokenizer: a local folder, a Hub name or the embedded default.

transformers, peft and bitsandbytes are imported inside functions: `--help` and `--print_config` need none of them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_align.attention import register_by_group
from lit_align.errors import UserError
from lit_align.logprobs import Head, logits
from lit_align.precision import dtype_of, empty_model, quantization_config, quantization_of
from lit_align.settings import PairSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TREE_FAMILIES = frozenset(
    {"llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "phi3", "mistral", "gemma2", "gemma", "granite", "cohere", "olmo2"}
)
"""``model_type`` of the families whose tree rows are proven equal to one row per completion by the tests."""


LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def load_tokenizer(settings: PairSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: If there is none to load, or it knows no end of sequence.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.source, **settings.hub_options())
    except (OSError, ValueError, KeyError, ImportError) as error:
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
            dtype=dtype_of(settings, device),
            quantization_config=quantization_config(settings, config, device),
            attn_implementation=_attention(config, device),
            device_map={"": device},
            use_safetensors=True,
            **settings.hub_options(),
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
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
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(
        weight=weight,
        bias=getattr(layer, "bias", None),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
        temperature=temperature,
    )


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """The scorer's logits are the model's own: some families scale or bend theirs in ways no config key tells.

    Args:
        model: A causal language model without an adapter, or with one that changes nothing.

    Raises:
        UserError: If the two differ by more than rounding on a few tokens.
    """
    head = head_of(model, 1.0)
    ids = torch.arange(1, 9, device=head.weight.device)[None] % head.weight.shape[0]
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    ours = logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0], head).float()
    gap, size = (own - ours).abs().max(), own.abs().max()
    if not gap <= size * (1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 5e-2):
        raise UserError(
            f"lit_align cannot score {type(model).__name__} models: their logits are not the last hidden state times "
            f"the output embedding, scaled and capped as the config says (they differ by up to {gap.item():.3g})"
        )


def stop_ids(model: PreTrainedModel, eos_token_id: int | None) -> list[int]:
    """The ids that end a completion: the tokenizer's end of sequence and those of the model's generation config."""
    own = model.generation_config.eos_token_id
    found = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({*found, *([] if eos_token_id is None else [eos_token_id])})


def shares_prompts(config: Any) -> bool:
    """Whether tree rows are exact for this model; says in the log what happens otherwise."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope in LENGTH_DEPENDENT_ROPE:
        log.warning(
            "the %s position encoding of this model depends on the longest sequence of a batch: beyond its original "
            "length a completion's log-prob depends on its neighbours; keep data.max_length below that",
            rope,
        )
    if config.model_type in TREE_FAMILIES:
        return True
    log.warning(
        "shared prompts are not proven exact for %s models: each completion gets a row of its own, which is slower",
        config.model_type,
    )
    return False


def _attention(config: Any, device: torch.device) -> str | None:
    """Tree masks need sdpa or eager, soft-capped attention scores need eager; other models choose themselves.

    On a CPU ``by_group`` leaves out what the masks shut off; on a GPU a call for each group costs more than it saves.
    """
    if config.model_type not in TREE_FAMILIES:
        return None
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"
    return register_by_group() if device.type == "cpu" else "sdpa"


def _silence_dropout(config: Any) -> None:
    """Set every dropout to 0: policy and reference must be the same function at the start, in train mode too."""
    for name, value in list(vars(config).items()):
        if (name.endswith(("dropout", "pdrop", "drop"))) and isinstance(value, int | float):
            setattr(config, name, 0.0)


def outline(settings: PairSettings, device: torch.device, attention: str) -> tuple[PreTrainedModel, str]:
    """The frozen base as ``load_base`` would make it, but on the meta device and never quantized.

    Args:
        settings: Model and precision.
        device: Where it would be loaded.
        attention: Name of the attention that takes the place of sdpa.

    Returns:
        The model, with shapes and no weights, and what it would be quantized to: none, nf4 or int8.

    Raises:
        UserError: If there is no config of such a model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(settings.source, **settings.hub_options())
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unloadable(settings, "model", error) from error
    _silence_dropout(config)
    kind = quantization_of(settings, config, device)
    config.quantization_config = None
    kernel = "eager" if _attention(config, device) == "eager" else attention
    options = {"dtype": dtype_of(settings, device), "attn_implementation": kernel}
    return empty_model(config, settings, **options).eval().requires_grad_(False), kind


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
