"""The model card: metadata the Hub can read, the facts, and nothing of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import BitsAndBytesConfig

from lit_align import assets
from lit_align.card import CardFacts, exported_card, front_matter, loading_code, render_card, versions

FACTS = CardFacts(
    base_model="owner/base",
    objective="DPO",
    summary="Direct preference optimization.",
    config={
        "seed_everything": 3,
        "model": {"init_args": {"beta": 0.25, "pair": {"lora": {"r": 8}, "revision": None}}},
        "data": {"init_args": {"dataset": "owner/pairs"}},
        "trainer": {"max_epochs": 2, "precision": None, "barebones": False},
    },
    report="train 80 read",
    metrics={"val/loss": 0.5, "train/rewards/margins": 1.25},
    samples=[
        {"prompts": 64, "step": 0, "reward": {"mean": 0.1, "standard_error": 0.02}, "ended": 0.9, "tokens": 20.0},
        {"prompts": 64, "step": 9, "reward": {"mean": 0.4, "standard_error": None}, "ended": 1.0, "tokens": 22.0},
    ],
    steps=9,
    planned_steps=10,
)


def front(text: str) -> dict[str, object]:
    begin, matter, _ = text.split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(matter)


def test_the_front_matter_is_what_the_hub_reads() -> None:
    found = front(render_card(FACTS))
    assert found["base_model"] == "owner/base"
    assert found["library_name"] == "peft"
    assert found["datasets"] == ["owner/pairs"]
    assert isinstance(found["tags"], list)


def test_a_path_of_this_machine_is_not_told(tmp_path: Path) -> None:
    model = tmp_path / "secret" / "base"
    model.mkdir(parents=True)
    data = str(tmp_path / "pairs.jsonl")
    facts = CardFacts(str(model), "DPO", config={"data": {"init_args": {"dataset": data}}})
    found = front_matter(facts)
    assert "base_model" not in found  # the Hub would look for it, or link to somebody else's
    assert "datasets" not in found
    text = render_card(facts).split("## Load it")[0]
    assert "The base model is `base`, a local folder." in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("model", "there"), [("owner/base", True), ("gpt2", True), ("stories", False), ("./base", False), ("a/b/c", False)]
)
def test_only_a_base_on_the_hub_is_linked_to(model: str, there: bool) -> None:
    assert ("base_model" in front_matter(CardFacts(model, "DPO"))) == there
    assert ("To publish this" in render_card(CardFacts(model, "DPO"))) != there


def test_a_datasets_configuration_is_no_part_of_its_link() -> None:
    facts = CardFacts("owner/base", "DPO", config={"data": {"init_args": {"dataset": "owner/pairs:binarized"}}})
    assert front_matter(facts)["datasets"] == ["owner/pairs"]


def test_the_card_of_a_merged_model_says_so_and_that_of_an_adapter_keeps_what_it_says() -> None:
    card = render_card(CardFacts("./base", "DPO", metrics={"val/loss": 0.5}))
    merged = exported_card(card, "owner/base", ["load_the_merged()"], merged="A float32 model.")
    assert front(merged)["base_model"] == "owner/base"
    assert front(merged)["library_name"] == "transformers"
    assert "load_the_merged()" in merged
    assert "PeftModel" not in merged
    assert "A float32 model. It was trained" in merged
    assert "To publish this" not in merged
    assert "| val/loss | 0.5 |" in merged
    assert exported_card(card, None, []) == card


def test_the_facts_are_in_the_tables() -> None:
    text = render_card(FACTS)
    for row in (
        "| model.beta | 0.25 |",
        "| model.pair.lora.r | 8 |",
        "| trainer.max_epochs | 2 |",
        "| seed_everything | 3 |",
        "| val/loss | 0.5 |",
        "| train/rewards/margins | 1.25 |",
        "| before | 0.100 ± 0.020 | – | 90% | 20.0 |",
        "| step 9 | 0.400 | – | 100% | 22.0 |",
        f"| peft | {peft.__version__} |",
    ):
        assert row in text
    assert "9 of 10 optimizer steps" in text
    assert "train 80 read" in text
    assert "None" not in text


def test_what_there_is_not_gets_no_section() -> None:
    text = render_card(CardFacts("owner/base", "DPO"))
    assert "## Samples" not in text
    assert "## Metrics" not in text
    assert "## Data" not in text


@pytest.mark.parametrize("model", ["owner/base", "stories"])
def test_the_loading_code_is_valid_and_portable(model: str) -> None:
    text = render_card(CardFacts(model, "DPO"))
    code = text.split("```python\n")[1].split("\n```")[0]
    compile(code, "card", "exec")
    assert str(Path(assets.__file__).parent) not in text
    assert len(loading_code(model, "adapter")) == 4


def test_versions_name_what_is_installed() -> None:
    assert versions()["peft"] == peft.__version__


def test_the_code_loads_the_base_as_training_held_it() -> None:
    plain = loading_code("owner/base", "there", held={"dtype": "float32", "quantization": "none", "revision": None})
    assert """from_pretrained('owner/base', dtype="float32")""" in plain[1]
    lines = loading_code("owner/base", "there", held={"dtype": "bfloat16", "quantization": "nf4", "revision": "abc"})
    asked: dict[str, Any] = {}

    class Model:
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> None:
            asked.update(name=name, **options)

    exec(lines[1], {"AutoModelForCausalLM": Model, "BitsAndBytesConfig": BitsAndBytesConfig})
    assert (asked["name"], asked["revision"], asked["dtype"]) == ("owner/base", "abc", "bfloat16")
    config = asked["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert "BitsAndBytesConfig" in lines[0]
    eight = loading_code("owner/base", "there", held={"dtype": "bfloat16", "quantization": "int8"})
    assert "BitsAndBytesConfig(load_in_8bit=True)" in eight[1]
