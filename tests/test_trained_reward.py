"""A trained reward, loaded from its folder, against the module that was trained on rows of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from lit_align.data import ScoredGroups
from lit_align.errors import UserError
from lit_align.objectives.reward_model import RewardModel
from lit_align.protocols import Reward, TokenReward
from lit_align.rewards import TrainedReward, own_device
from lit_align.settings import PairSettings
from tests.data.conftest import byte_tokenizer, spaced_tokenizer, write_jsonl
from tests.families import save_tiny

ROWS = [
    {"prompt": "Hello?", "completions": [" Hello", "l", "?QQ e</s>"], "rewards": [3.0, 2.0, 1.0]},
    {"prompt": "Q", "completions": [" o", "olleH  "], "rewards": [1.0, 0.0]},
    {"prompt": " eel? ", "completions": ["Hell", " Hell", "  Hell", "o"], "rewards": [4.0, 3.0, 2.0, 1.0]},
]
TOKENIZERS = {
    "plain": byte_tokenizer(),
    "specials around a text": byte_tokenizer(post="<s> $A </s>", bos_token="<s>"),
    "a space before the first word": spaced_tokenizer(),
    "a space before any text": spaced_tokenizer(normalizes=True),
}


def make(folder: Path, tokenizer: PreTrainedTokenizerFast, scaled: bool = True) -> RewardModel:
    """A reward model with random weights, saved to ``folder/adapter``."""
    model = save_tiny("llama", folder / "base", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(model)
    module = RewardModel(pair=PairSettings(model))
    module.configure_model()
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    module.save(folder / "adapter")
    if scaled:
        path = folder / "adapter" / "reward.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mean": -0.5, "std": 2.0}))
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path, TOKENIZERS["plain"])
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rewards_are_those_of_the_module_on_the_rows_of_the_data_layer(name: str, tmp_path: Path) -> None:
    module = make(tmp_path, TOKENIZERS[name])
    rows = str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    data = ScoredGroups(rows, validation_dataset=rows, validation_batch_size=3)
    data.load(TOKENIZERS[name])
    (batch,) = data.val_dataloader()
    expected = module.rewards(batch)[batch.present].tolist()
    reward = TrainedReward(tmp_path / "adapter", standardize=False, batch_size=4, device="cpu")
    prompts = [row["prompt"] for row in ROWS for _ in row["completions"]]
    completions = [text for row in ROWS for text in row["completions"]]
    assert reward(prompts, completions) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert max(expected) - min(expected) > 0.1
    scaled = TrainedReward(tmp_path / "adapter", device="cpu")
    assert scaled(prompts, completions) == pytest.approx([(r + 0.5) / 2 for r in expected], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_that_were_drawn_are_judged_as_they_are(name: str, tmp_path: Path) -> None:
    module = make(tmp_path, TOKENIZERS[name])
    rows = str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    data = ScoredGroups(rows, validation_dataset=rows, validation_batch_size=3)
    data.load(TOKENIZERS[name])
    (batch,) = data.val_dataloader()
    # One that the budget cut has no end of sequence, and gets none.
    mask = batch.completion_mask.clone()
    mask[0, 0, batch.lengths[0, 0] - 1] = False
    batch = batch._replace(completion_mask=mask)
    expected = (module.rewards(batch) + 0.5) / 2
    reward = TrainedReward(tmp_path / "adapter", batch_size=4, device="cpu")
    assert isinstance(reward, TokenReward)
    found = reward.on_tokens(batch, TOKENIZERS[name])
    assert found is not None
    torch.testing.assert_close(found[batch.present], expected[batch.present].detach(), atol=1e-4, rtol=1e-4)
    other = next(tokenizer for kind, tokenizer in TOKENIZERS.items() if len(tokenizer) != len(TOKENIZERS[name]))
    assert reward.on_tokens(batch, other) is None
    assert reward.on_tokens(batch, TOKENIZERS[name]) is not None


def test_neither_batches_nor_order_nor_neighbours_change_a_reward(folder: Path) -> None:
    asked, given = ["a", "b", "a", "cc", "a"], [" x", " yy", " zzz", "", " x"]
    together = TrainedReward(folder, batch_size=16, device="cpu")(asked, given)
    alone = TrainedReward(folder, batch_size=1, device="cpu")(asked, given)
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert together[0] == pytest.approx(together[4], rel=1e-4)
    backwards = TrainedReward(folder, batch_size=3, device="cpu")(asked[::-1], given[::-1])
    assert backwards[::-1] == pytest.approx(together, rel=1e-4, abs=1e-5)


def test_a_beginning_of_sequence_that_is_there_already_is_not_put_twice(tmp_path: Path) -> None:
    make(tmp_path, TOKENIZERS["specials around a text"])
    reward = TrainedReward(tmp_path / "adapter", device="cpu")
    with_one, without = reward(["<s>ab", "ab"], [" c", " c"])
    assert with_one == pytest.approx(without)


def test_it_is_held_as_in_training(folder: Path) -> None:
    """What "auto" meant there is in ``base.json``."""
    assert json.loads((folder / "reward.json").read_text())["dtype"] == "auto"
    assert TrainedReward(folder, device="cpu")._pair.base.dtype == torch.float32
    held = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps(held | {"dtype": "bfloat16"}))
    assert TrainedReward(folder, device="cpu")._pair.base.dtype == torch.bfloat16


def test_it_is_a_reward_without_gradient(folder: Path) -> None:
    reward = TrainedReward(folder, device="cpu")
    assert isinstance(reward, Reward)
    assert reward([], []) == []
    assert not [p for p in reward._pair.parameters() if p.requires_grad]
    assert type(reward(["a"], ["b"])[0]) is float
    with pytest.raises(ValueError, match="1 prompts for 2 completions"):
        reward(["a"], ["b", "c"])


def test_the_head_is_read_from_its_file(folder: Path) -> None:
    """Twice the head is twice the reward."""
    before = TrainedReward(folder, standardize=False, device="cpu")(["a"], ["b"])[0]
    path = folder / "reward_head.safetensors"
    save_file({"weight": 2 * load_file(path)["weight"]}, path)
    assert TrainedReward(folder, standardize=False, device="cpu")(["a"], ["b"]) == pytest.approx([2 * before])


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove("reward_head.safetensors"), "holds no reward_head.safetensors"),
        (remove("reward.json"), "holds no reward.json"),
        (write("reward_head.safetensors", "not tensors"), "no trained reward that can be read"),
        (write("reward.json", "{}"), "KeyError 'model'"),
        (write("reward.json", "{"), "JSONDecodeError"),
        (remove("adapter_model.safetensors"), "adapter_model.safetensors"),
    ],
)
def test_a_spoiled_folder_is_refused(folder: Path, spoil: Any, words: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=words):
        TrainedReward(folder, device="cpu")


def test_the_wrong_folder_is_refused_with_the_right_one(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"did you mean {folder}\?"):
        TrainedReward(folder.parent)
    with pytest.raises(UserError, match="give the folder adapter of a run of RewardModel"):
        TrainedReward(folder / "none")
    with pytest.raises(UserError, match="batch_size is 0"):
        TrainedReward(folder, batch_size=0)


def test_without_validation_rows_there_is_nothing_to_standardize_by(tmp_path: Path) -> None:
    make(tmp_path, TOKENIZERS["plain"], scaled=False)
    with pytest.raises(UserError, match="no mean and standard deviation"):
        TrainedReward(tmp_path / "adapter", device="cpu")
    assert TrainedReward(tmp_path / "adapter", standardize=False, device="cpu")(["a"], ["b"])


RANKS = [({}, 0), ({"LOCAL_RANK": "1"}, 1), ({"LOCAL_RANK": "3"}, 1), ({"SLURM_LOCALID": "1"}, 1)]


@pytest.mark.parametrize(("environment", "expected"), RANKS)
def test_each_process_has_a_gpu_of_its_own(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its number: "cuda" alone would be another one once the launcher has chosen."""
    for name, value in (("is_available", True), ("current_device", 0), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert own_device() == torch.device("cuda", expected)
