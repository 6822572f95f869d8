"""Stage 6: the folder that ships."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .data import Row


def write_package(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: dict[str, Sequence[Row]],
    about: dict[str, Any],
    budget: int,
) -> None:
    """Write model, tokenizer, data, figures and card.

    Args:
        folder: Where to; made if it is missing.
        model: Any dtype; saved in bfloat16.
        tokenizer: Ours.
        rows: ``"train"`` and ``"validation"``.
        about: What ``about.json`` says.
        budget: Tokens of a completion, for the generation config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=budget,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, part in rows.items():
        lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(model, rows, about), encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def _card(model: LlamaForCausalLM, rows: dict[str, Sequence[Row]], about: dict[str, Any]) -> str:
    card = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
    return card.substitute(
        parameters=f"{model.num_parameters():,}",
        vocabulary=f"{model.config.vocab_size:,}",
        train=f"{len(rows['train']):,}",
        validation=len(rows["validation"]),
        completions=about["data"]["completions"],
        teacher=about["teacher"],
        sharpen=about["settings"]["sharpen"],
        spread=about["data"]["least_spread"],
    )
