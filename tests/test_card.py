"""The model card: metadata the Hub can read, the facts, and nothing of this machine."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import yaml

from lit_align import assets
from lit_align.card import CardFacts, front_matter, loading_code, render_card, versions

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
    found = front_matter(CardFacts(str(model), "DPO", config={"data": {"init_args": {"dataset": data}}}))
    assert found["base_model"] == "base"
    assert "datasets" not in found


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
    assert len(loading_code(model, "adapter")) == 3


def test_versions_name_what_is_installed() -> None:
    assert versions()["peft"] == peft.__version__
