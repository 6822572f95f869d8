"""What other programs ask of an adapter: vLLM's limits, and the way to llama.cpp. Neither has to be installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_align.settings import PairSettings

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` of vLLM can be; 16 is its default."""
WHOLE = ("lm_head", "embed_tokens", "wte", "embed_in", "embed_out")
"""Input and output embeddings, by the names that the families give them."""
FACTORS = (".lora_A.weight", ".lora_B.weight")


def vllm_problems(config: Mapping[str, Any], weights: Path) -> list[str]:
    """Why vLLM would not serve an adapter, or would serve something else; after its ``PEFTHelper``.

    Args:
        config: ``adapter_config.json``.
        weights: ``adapter_model.safetensors``; only the names in it are read.
    """
    from safetensors import safe_open

    with safe_open(str(weights), "pt") as file:
        names = list(file.keys())
    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names})
    odd = [name for name in names if not name.endswith(FACTORS)]
    adapted = [name for name in modules if name in WHOLE]
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    checks = {
        f"peft_type is {config.get('peft_type')}; it serves LORA only": config.get("peft_type") != "LORA",
        f"rank r is {config.get('r')}; the largest is {VLLM_RANKS[-1]}": int(config.get("r") or 0) > VLLM_RANKS[-1],
        f"bias is {config.get('bias')!r}; it must be 'none'": config.get("bias", "none") != "none",
        "lora_bias is set; its factors must have no bias": bool(config.get("lora_bias")),
        "use_dora is set, which it does not know": bool(config.get("use_dora")),
        f"modules_to_save is {config.get('modules_to_save')}; there must be none": bool(config.get("modules_to_save")),
        f"trained in full are {', '.join(odd[:3])}; only LoRA's factors are read": bool(odd),
        f"{', '.join(adapted)} has an adapter; embeddings and the head must have none": bool(adapted),
        f"{' and '.join(patterns)} is set; one rank and one alpha must hold for all modules": bool(patterns),
        "layer_replication is set, which it does not know": bool(config.get("layer_replication")),
        "target_parameters is set; only linear modules are read": bool(config.get("target_parameters")),
    }
    return [problem for problem, holds in checks.items() if holds]


def vllm_flags(config: Mapping[str, Any], adapter: Path) -> list[str]:
    """Flags of ``vllm serve`` for an adapter that has no problems."""
    rank = next(rank for rank in VLLM_RANKS if rank >= int(config["r"]))
    wide = [] if rank <= 16 else ["--max-lora-rank", str(rank)]
    return ["--enable-lora", *wide, "--lora-modules", f"policy={adapter}"]


def llama_cpp_recipe(out: Path, settings: PairSettings, *, merged: bool) -> list[str]:
    """The commands that make a GGUF of what was exported, to run in a checkout of llama.cpp."""
    if merged:
        return [
            "for llama.cpp, in its checkout:",
            f"  python convert_hf_to_gguf.py {out.resolve()} --outfile policy.gguf --outtype auto",
            "  llama-quantize policy.gguf policy-Q4_K_M.gguf Q4_K_M",
            "  llama-cli -m policy-Q4_K_M.gguf",
        ]
    local = Path(settings.source).exists()
    base = ["--base", str(Path(settings.source).resolve())] if local else ["--base-model-id", settings.model]
    return [
        "for llama.cpp, in its checkout (BASE.gguf is the base model, by convert_hf_to_gguf.py or downloaded):",
        f"  python convert_lora_to_gguf.py {' '.join(base)} --outfile policy-lora.gguf --outtype f16 {out.resolve()}",
        "  llama-cli -m BASE.gguf --lora policy-lora.gguf",
    ]
