"""Turn a GGUF file into a model folder that lit_align, transformers and peft load: safetensors, config, tokenizer.

    python tools/gguf_to_model.py model.gguf out/model

A model read from GGUF keeps traces of that format in its config and refuses to be saved, so its weights go into a clean
model of the same configuration. Needs the extra `gguf`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def convert(source: Path, target: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model of a GGUF file to a folder, dequantized."""
    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
    options = {key: value for key, value in read.config.to_dict().items() if key not in {"quantization_config"}}
    options.pop("_name_or_path", None)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    clean = AutoModelForCausalLM.from_config(config, dtype=dtype)
    clean.load_state_dict(read.state_dict())
    clean.generation_config.eos_token_id = tokenizer.eos_token_id
    clean.save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the .gguf file")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="type written")
    options = parser.parse_args()
    if not options.source.is_file():
        parser.error(f"{options.source} is no file")
    convert(options.source, options.target, getattr(torch, options.dtype))
    print(f"wrote {options.target}")


if __name__ == "__main__":
    main()
