"""The model card of a run: what was trained on what, how, with which result, and how to load it."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from lit_align.assets import resolve

TRAINER_KEYS = (
    "accelerator",
    "devices",
    "strategy",
    "precision",
    "max_epochs",
    "max_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
)
"""What the card tells of the trainer."""
UNPUBLISHED = "The base model is `"
"""Begins the line about a base that is not on the Hub."""
PACKAGES = ("lit_align", "torch", "lightning", "transformers", "peft", "bitsandbytes")


@dataclass
class CardFacts:
    """What a model card says.

    Attributes:
        base_model: Local folder, Hub name or the packaged model, as the user named it.
        objective: Class name of the objective.
        summary: One line about it.
        config: The effective configuration, with the keys ``model``, ``data`` and ``trainer``.
        report: What was read, kept and dropped, as ``DataReport.render`` puts it.
        metrics: Logged name -> last value.
        samples: Summaries of the draws, in order; the first is from the reference.
        steps: Optimizer steps taken.
        planned_steps: Optimizer steps of the whole run, if known.
        interrupted: Whether the user stopped the run.
        generates: Whether the model writes text; otherwise it judges it.
        loading: The objective's own lines of Python that load the result, with ``{folder}`` for the adapter's folder;
            none for a plain adapter.
        held: How training held the base, as ``adapters.held_base`` gives it.
    """

    base_model: str
    objective: str
    summary: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    report: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    samples: Sequence[dict[str, Any]] = ()
    steps: int = 0
    planned_steps: int | None = None
    interrupted: bool = False
    generates: bool = True
    loading: Sequence[str] = ()
    held: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dataset(self) -> str | None:
        """The dataset's name or path, if the configuration names one."""
        return (self.config.get("data") or {}).get("init_args", {}).get("dataset")


def render_card(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter, in the form the Hub reads."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    planned = f" of {facts.planned_steps}" if facts.planned_steps is not None else ""
    state = " The run was interrupted; this is the adapter at that moment." if facts.interrupted else ""
    metrics = ((name, f"{value:.5g}") for name, value in sorted(facts.metrics.items()))
    parts = [
        f"---\n{front}---",
        f"# {facts.objective} adapter for {shown_model(facts.base_model)}",
        f"A LoRA adapter trained on preferences with lit_align: {facts.steps}{planned} optimizer steps of "
        f"{facts.objective}.{state}\n\n{facts.summary}".rstrip(),
        "" if on_hub(facts.base_model) else _unpublished(facts.base_model),
        load_section(_portable_code(facts)),
        _section("Samples", _samples(facts.samples)),
        _section("Metrics", _table(("metric", "last value"), metrics)),
        _section("Hyperparameters", _table(("key", "value"), _hyperparameters(facts.config))),
        _section("Data", f"```\n{facts.report}\n```" if facts.report else ""),
        _section("Versions", _table(("package", "version"), versions().items())),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """The metadata of the card; the Hub makes links of it, so a base model or a dataset that is not there stays out."""
    found: dict[str, Any] = {"base_model": facts.base_model} if on_hub(facts.base_model) else {}
    found["library_name"] = "peft"
    found["pipeline_tag"] = "text-generation" if facts.generates else "text-classification"
    found["tags"] = ["lit_align", "preference-alignment", "lora", facts.objective.lower()]
    dataset = (facts.dataset or "").partition(":")[0]
    if "/" in dataset and on_hub(dataset):
        found["datasets"] = [dataset]
    return found


def exported_card(card: str, base_model: str | None, loading: Sequence[str], merged: str = "") -> str:
    """The card of a run for what is made of its adapter.

    Args:
        card: As ``render_card`` wrote it.
        base_model: The base's name on the Hub; None leaves what the card says.
        loading: Lines of Python that load the result; none leaves those of the card.
        merged: What is said of a merged model; "" for an adapter.
    """
    _, matter, body = card.split("---\n", 2)
    front = yaml.safe_load(matter)
    if base_model is not None:
        front = {"base_model": base_model} | front | {"base_model": base_model}
        body = re.sub(rf"^{UNPUBLISHED}.*\n\n", "", body, flags=re.MULTILINE)
    if merged:
        front |= {"library_name": "transformers"} | (
            {"base_model_relation": "finetune"} if "base_model" in front else {}
        )
        front["tags"] = [tag for tag in front["tags"] if tag != "lora"]
        body = body.replace(" adapter for ", " of ", 1).replace("A LoRA adapter trained", f"{merged} It was trained", 1)
    section = load_section(loading)
    body = (
        body if not loading else re.sub(r"## Load it\n\n```python\n.*?\n```", lambda _: section, body, flags=re.DOTALL)
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{body}"


def load_section(lines: Sequence[str]) -> str:
    """The section of the card that says how to load what it describes."""
    return _section("Load it", "```python\n" + "\n".join(lines) + "\n```")


QUANTIZED = {
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
    'bnb_4bit_compute_dtype="{dtype}"',
    "int8": "load_in_8bit=True",
}
"""What transformers is told of a quantized base."""


def loading_code(
    model: str, adapter: str, loading: Sequence[str] = (), held: Mapping[str, Any] | None = None
) -> list[str]:
    """Lines of Python that load an adapter with transformers and peft, or the objective's own.

    Args:
        model: Base model, as the user named it.
        adapter: Folder of the adapter.
        loading: The objective's own lines, with ``{folder}`` for the folder.
        held: How training held the base, which gives the logits of training: transformers takes type and precision of
            the file if it is not told.
    """
    if loading:
        return [line.format(folder=adapter) for line in loading]
    held = held or {}
    classes, options = "AutoModelForCausalLM, AutoTokenizer", [repr(resolve(model))]
    if held.get("revision"):
        options.append(f"revision={held['revision']!r}")
    if held.get("dtype"):
        options.append(f'dtype="{held["dtype"]}"')
    if held.get("quantization") in QUANTIZED:
        classes += ", BitsAndBytesConfig"
        how = QUANTIZED[held["quantization"]].format(dtype=held.get("dtype", "bfloat16"))
        options.append(f"quantization_config=BitsAndBytesConfig({how})")
    return [
        f"from peft import PeftModel; from transformers import {classes}",
        f"base = AutoModelForCausalLM.from_pretrained({', '.join(options)})",
        f"model = PeftModel.from_pretrained(base, {adapter!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({adapter!r})",
    ]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _portable_code(facts: CardFacts) -> list[str]:
    """The loading code without a path of this machine, for the packaged model and the adapter's folder."""
    lines = loading_code(facts.base_model, "adapter", facts.loading, facts.held)
    packaged = resolve(facts.base_model)
    if packaged == facts.base_model or facts.loading:
        return lines
    lines = [line.replace(repr(packaged), f"resolve({facts.base_model!r})") for line in lines]
    return ["from lit_align.assets import resolve", *lines]


def on_hub(name: str) -> bool:
    """Whether a name reads as one on the Hub, and nothing here has that name."""
    here = resolve(name) != name or Path(name).exists()
    return not here and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def shown_model(name: str) -> str:
    """A model's name without a path of this machine."""
    return name if on_hub(name) else Path(name).name


def _unpublished(name: str) -> str:
    kind = "the model that comes with lit_align" if resolve(name) != name else "a local folder"
    return f"{UNPUBLISHED}{shown_model(name)}`, {kind}. To publish this, set `base_model` to its name on the Hub."


def _samples(draws: Sequence[dict[str, Any]]) -> str:
    if not draws:
        return ""
    rows = (
        (
            "before" if index == 0 else f"step {draw['step']}",
            _plus_minus(draw.get("reward")),
            _plus_minus(draw.get("kl")),
            f"{draw['ended']:.0%}",
            f"{draw['tokens']:.1f}",
        )
        for index, draw in enumerate(draws)
    )
    table = _table(("", "reward", "KL(policy ‖ reference), nats", "ended", "tokens"), rows)
    return f"{draws[0]['prompts']} held-out prompts; mean ± standard error over prompts.\n\n{table}"


def _plus_minus(value: dict[str, float | None] | None) -> str:
    if value is None:
        return "–"
    error = value["standard_error"]
    return f"{value['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _hyperparameters(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings of model, data and trainer, without what was left unset."""
    for key in ("model", "data"):
        section = config.get(key) or {}
        yield from _flat(section.get("init_args", {}), f"{key}.")
    trainer = config.get("trainer") or {}
    yield from _flat({key: trainer.get(key) for key in TRAINER_KEYS}, "trainer.")
    if "seed_everything" in config:
        yield "seed_everything", config["seed_everything"]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + str(key), value


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(head: Sequence[str], rows: Any) -> str:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *lines])
