"""Make of a run what can be loaded elsewhere: its adapter, or the base with the adapter merged into its weights.

A merged model is compared with the policy before it is written. --check vllm looks at an adapter without exporting it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lit_align.adapters import held_base
from lit_align.card import CardFacts, exported_card, loading_code, render_card, shown_model
from lit_align.commands.arguments import Loading, parse
from lit_align.commands.merging import merge
from lit_align.commands.runs import WEIGHTS, Run, device_of, find_run, with_base
from lit_align.commands.serving import llama_cpp_recipe, vllm_flags, vllm_problems
from lit_align.errors import UserError
from lit_align.models import load_tokenizer

BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "base.json",
    "reward.json",
    "reward_head.safetensors",
)
"""Files of an adapter's folder that go with its weights, where they are there."""


@dataclass(frozen=True)
class Export:
    """What is exported, and where to.

    Attributes:
        run: Run folder, or the folder of an adapter.
        out: Folder to write; it must not exist. None only checks.
        merge: Type of the weights of a merged model; None exports the adapter.
        base_model: Name of the base on the Hub, for the adapter's config and the card, where training read a folder.
        check: "vllm" refuses an adapter that vLLM would not serve.
    """

    run: str
    out: str | None = None
    merge: Literal["bfloat16", "float16", "float32"] | None = None
    base_model: str | None = None
    check: Literal["vllm"] | None = None


def run(args: Sequence[str]) -> None:
    """Check, export, and say what can be done with the result."""
    options, loading = parse("export", args, __doc__, Export, Loading)
    found = find_run(options.run)
    found = replace(found, settings=with_base(found.settings, loading))
    config = json.loads((found.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if options.out is None and options.check is None:
        raise UserError("nothing to do: give --out FOLDER to export to, or --check vllm")
    if options.check == "vllm":
        kept = options.out is None or options.merge is not None
        _check_vllm(found, config, found.adapter if kept else Path(str(options.out)))
    if options.out is None:
        return
    out = Path(options.out)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"out={out} exists and is not empty; choose another folder")
    if options.merge is None:
        _export_adapter(found, config, out, options.base_model)
    else:
        _export_merged(found, out, options.merge, loading.device, options.base_model)
    print("\n".join(llama_cpp_recipe(out, found.settings, merged=options.merge is not None)))


def _check_vllm(found: Run, config: dict[str, Any], served: Path) -> None:
    """Print how vLLM serves the adapter from the folder where it will lie.

    Raises:
        UserError: If it would not.
    """
    problems = vllm_problems(config, found.adapter / WEIGHTS)
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"vLLM would refuse {found.adapter}; --merge bfloat16 gives a model it serves:\n  {lines}")
    print(f"vLLM serves this adapter: rank {config['r']}, no bias, no module in full, modules {_modules(config)}")
    print(f"  vllm serve {found.settings.source} {' '.join(vllm_flags(config, served))}")


def _modules(config: dict[str, Any]) -> str:
    modules = config["target_modules"]
    return modules if isinstance(modules, str) else ", ".join(sorted(modules))


def _export_adapter(found: Run, config: dict[str, Any], out: Path, base_model: str | None) -> None:
    """Weights, tokenizer, config without a path of this machine, and card."""
    out.mkdir(parents=True, exist_ok=True)
    for path in (found.adapter / name for name in (WEIGHTS, *BESIDE)):
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    model = found.settings.model
    shown = {"base_model_name_or_path": base_model or shown_model(model)}
    named = config | shown
    if "target_modules" in config:  # prompt tuning has none
        named["target_modules"] = _sorted(config["target_modules"])
    (out / "adapter_config.json").write_text(json.dumps(named, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_card(found, out, base_model)
    print(f"adapter exported to {out}; load it with")
    print("\n".join(f"  {line}" for line in loading_code(model, str(out), held=held_base(out))))


def _sorted(modules: Any) -> Any:
    return modules if isinstance(modules, str) else sorted(modules)


def _export_merged(found: Run, out: Path, dtype: str, device: str, base_model: str | None) -> None:
    """The merged model with its tokenizer and card, after a look at its logits.

    Raises:
        UserError: If the logits are not those of the policy; nothing is written then.
    """
    if (found.adapter / "reward.json").is_file():
        raise UserError(f"{found.adapter} is a trained reward, whose head no merged model holds; export the adapter")
    model, agreement = merge(found, dtype, device_of(device))
    if not agreement.holds:
        raise UserError(f"the merged model is not the policy, so it was not written: {agreement}")
    model.save_pretrained(str(out))
    load_tokenizer(found.settings).save_pretrained(str(out))
    _write_card(found, out, base_model, f"A {dtype} model into which a LoRA adapter was merged.")
    print(f"merged model written to {out}: {agreement}\nload it with")
    print("\n".join(f"  {line}" for line in merged_code(str(out))))


def merged_code(folder: str) -> list[str]:
    """Lines of Python that load a merged model."""
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto")',
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
    ]


def _write_card(found: Run, out: Path, base_model: str | None, merged: str = "") -> None:
    """The run's own card, or a short one where there is none of ours, for what was exported."""
    own = found.adapter / "README.md"
    text = own.read_text(encoding="utf-8") if own.is_file() else ""
    if "- lit_align\n" not in text:
        text = render_card(CardFacts(found.settings.model, found.objective or "LoRA", config=found.config))
    code: list[str] = []  # the card's own
    if merged:
        code = merged_code(out.name)
    elif base_model is not None and not (found.adapter / "reward.json").is_file():
        code = loading_code(base_model, "adapter", held=held_base(found.adapter))
    (out / "README.md").write_text(exported_card(text, base_model, code, merged), encoding="utf-8")
