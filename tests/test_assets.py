"""The embedded model and data: what the rest of the project may rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.assets import resolve
from lit_align.rewards import Vader

FOLDER = Path(resolve("stories"))
TEXTS = ["Once upon a time, there was a dog.", ' "No!" she said.  Two  spaces', "naïve 犬 🙂\n\ttab", ""]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_resolve_knows_its_own_names_alone() -> None:
    assert (FOLDER / "config.json").is_file()
    for name in ("./stories", "Qwen/Qwen2.5-0.5B-Instruct", "/somewhere/stories"):
        assert resolve(name) == name


def test_resolve_imports_nothing_heavy() -> None:
    code = "import sys, lit_align.assets; print({'torch', 'transformers', 'vaderSentiment'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".model"))]
    assert (FOLDER / "model.safetensors").stat().st_size < 10_000_000


def test_model_has_the_size_of_its_card(model: Any) -> None:
    count = sum(weight.numel() for weight in model.parameters())
    assert 3_000_000 < count < 5_000_000
    assert f"{count:,}-parameter" in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert model.config.model_type == "llama"
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_model_is_stored_in_bfloat16() -> None:
    from safetensors import safe_open

    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_special_tokens(tokenizer: Any, model: Any) -> None:
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(set(specials)) == 3
    for config in (model.config, model.generation_config):
        assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == specials
    assert tokenizer.is_fast
    assert tokenizer.chat_template is None
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    plain = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(plain) == text
    assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *plain]
    assert not set(plain) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(("name", "count"), [("train", 900), ("validation", 100)])
def test_rows(tokenizer: Any, name: str, count: int) -> None:
    rows, judge = read(name), Vader()
    assert len(rows) >= count
    for row in rows:
        assert set(row) == {"prompt", "completions", "rewards"}
        assert len(set(row["completions"])) == len(row["rewards"]) == 4
        assert all(text.startswith(" ") and text.strip() for text in row["completions"])
        assert row["rewards"] == pytest.approx(judge([row["prompt"]] * 4, row["completions"]), abs=1e-6)
        assert max(row["rewards"]) - min(row["rewards"]) >= 0.3
        whole = tokenizer(row["prompt"] + row["completions"][0]).input_ids
        parts = (
            tokenizer(row["prompt"]).input_ids + tokenizer(row["completions"][0], add_special_tokens=False).input_ids
        )
        assert whole == parts
        assert len(tokenizer(row["completions"][0], add_special_tokens=False).input_ids) < 64


def test_validation_prompts_are_not_training_prompts() -> None:
    train, validation = ([row["prompt"] for row in read(name)] for name in ("train", "validation"))
    assert len(set(train)) == len(train)
    assert len(set(validation)) == len(validation)
    assert not set(train) & set(validation)
    assert not [prompt for prompt in validation if any(other.startswith(prompt) for other in train)]


def test_about_names_oracle_and_licence() -> None:
    about = json.loads((FOLDER / "about.json").read_text(encoding="utf-8"))
    assert about["oracle"] == "lit_align.rewards.Vader"
    assert about["licence"] == "Apache-2.0"
    for name in ("train", "validation"):
        rewards = [reward for row in read(name) for reward in row["rewards"]]
        assert about["data"][name]["mean_reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-3)
        assert about["data"][name]["prompts"] == len(read(name))


def test_there_is_room_for_a_better_reward() -> None:
    rewards = [reward for row in read("validation") for reward in row["rewards"]]
    assert -0.1 < sum(rewards) / len(rewards) < 0.35


def test_completions_end_by_themselves(tokenizer: Any, model: Any) -> None:
    torch.manual_seed(0)
    prompts = [row["prompt"] for row in read("validation")[:24]]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    drawn = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64)
    after = drawn[:, batch.input_ids.shape[1] :]
    assert (after == tokenizer.eos_token_id).any(-1).float().mean() > 0.9
    assert (after[:, 0] != tokenizer.eos_token_id).float().mean() > 0.9


def test_the_policy_finds_its_own_completions_likelier_than_shuffled_ones(tokenizer: Any, model: Any) -> None:
    def surprise(prompt: str, completion: str) -> float:
        before = tokenizer(prompt).input_ids
        after = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.inference_mode():
            logps = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        return -logps.gather(-1, torch.tensor(after)[:, None]).mean().item()

    for row in read("validation")[:20]:
        text = row["completions"][0]
        assert surprise(row["prompt"], text) < surprise(row["prompt"], " " + " ".join(reversed(text.split())))
