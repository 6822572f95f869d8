"""The tool that writes scored groups, on a model of random weights that reads and writes bytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.data import ScoredGroups
from lit_align.objectives.reward_model import RewardModel
from lit_align.rewards import TrainedReward
from lit_align.settings import PairSettings
from tests.data.conftest import CHATML, byte_tokenizer, write_jsonl
from tests.families import save_tiny

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def score() -> Iterator[Any]:
    """The tool."""
    sys.path.insert(0, str(TOOLS))
    import score as tool

    yield tool
    sys.path.remove(str(TOOLS))


def base(folder: Path, template: str | None = None) -> str:
    tokenizer = byte_tokenizer(template)
    model = save_tiny("llama", folder, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(model)
    return model


def letters(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Characters of the completion, and a hundred for each of the prompt."""
    return [100.0 * len(prompt) + len(text) for prompt, text in zip(prompts, completions, strict=True)]


def run(tool: Any, folder: Path, rows: list[Any], *options: str, reward: str = "") -> list[dict[str, Any]]:
    write_jsonl(folder / "rows.jsonl", rows)
    out = folder / "out.jsonl"
    out.unlink(missing_ok=True)
    name = reward or f"{__name__}.letters"
    code = tool.main(["--dataset", str(folder / "rows.jsonl"), "--reward", name, "--out", str(out), *options])
    assert code == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize(
    ("row", "completions"),
    [
        ({"completions": [" a", " bb"], "rewards": [9.0, 9.0]}, [" a", " bb"]),
        ({"completions": [" a", " bb", ""]}, [" a", " bb"]),
        ({"chosen": " yes", "rejected": " no"}, [" yes", " no"]),
        ({"completion": " yes", "label": True}, [" yes"]),
        ({"completion": " yes"}, [" yes"]),
    ],
)
def test_given_completions_of_any_format_are_judged(
    score: Any, tmp_path: Path, row: dict[str, Any], completions: list[str]
) -> None:
    found = run(score, tmp_path, [{"prompt": "Ab", **row}, {"prompt": "Abc", **row}])
    assert [one["prompt"] for one in found] == ["Ab", "Abc"]
    for one, size in zip(found, (2, 3), strict=True):
        assert one["completions"] == completions
        assert one["rewards"] == [100.0 * size + len(text) for text in completions]


def test_completions_are_drawn_for_each_distinct_prompt_from_prompts_alone(
    score: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = base(tmp_path / "base")
    rows = [{"text": prompt} for prompt in ("Once", "Once", "Tom", "A")]
    options = ["--model", model, "--columns", "prompt=text", "--completions", "3", "--max_new_tokens", "5"]
    found = run(score, tmp_path, rows, *options, "--batch_size", "2")
    assert [one["prompt"] for one in found] == ["Once", "Tom", "A"]
    assert all(len(one["completions"]) == len(one["rewards"]) == 3 for one in found)
    assert all(len(text) <= 5 for one in found for text in one["completions"])
    assert "wrote 3 rows" in capsys.readouterr().out
    assert run(score, tmp_path, rows, *options, "--batch_size", "2") == found
    assert run(score, tmp_path, rows, *options, "--batch_size", "2", "--seed", "1") != found


def test_the_adapter_is_what_writes(score: Any, tmp_path: Path) -> None:
    """An adapter that makes the model as good as deterministic."""
    from lit_align.pair import PolicyReferencePair

    model = base(tmp_path / "base")
    pair = PolicyReferencePair(PairSettings(model))
    torch.manual_seed(0)
    for parameter in pair.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.0, 1.0)
    pair.save_adapter(tmp_path / "adapter")
    options = ["--model", model, "--max_new_tokens", "6", "--temperature", "0.001"]
    rows = [{"prompt": prompt} for prompt in ("Once", "Tom")]
    plain = run(score, tmp_path, rows, *options)
    adapted = run(score, tmp_path, rows, *options, "--adapter", str(tmp_path / "adapter"))
    assert [one["completions"] for one in plain] != [one["completions"] for one in adapted]
    greedy = [len(set(one["completions"])) for one in plain + adapted]
    assert greedy == [1, 1, 1, 1]


def test_messages_stay_messages_and_the_reward_reads_the_template(score: Any, tmp_path: Path) -> None:
    model = base(tmp_path / "base", CHATML)
    prompt = [{"role": "user", "content": "Tea?"}]
    rows = [{"prompt": prompt, "chosen": [{"role": "assistant", "content": "Yes"}], "rejected": "No"}]
    asked = "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n"
    (drawn,) = run(score, tmp_path, rows, "--model", model, "--max_new_tokens", "4", "--completions", "2")
    assert drawn["prompt"] == prompt
    assert drawn["rewards"] == letters([asked] * 2, drawn["completions"])
    (given,) = run(score, tmp_path, rows)
    assert given["rewards"] == letters(["Tea?"] * 2, ["Yes", "No"])  # no tokenizer at hand, so no template


def test_a_trained_reward_judges_what_scored_groups_reads(score: Any, tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    module = RewardModel(pair=PairSettings(model))
    module.configure_model()
    module.save(tmp_path / "adapter")
    about = tmp_path / "adapter" / "reward.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"mean": 0.0, "std": 0.001}))
    rows = [{"prompt": f"Story {n}", "chosen": " abc", "rejected": " d"} for n in range(3)]
    found = run(score, tmp_path, rows, reward=str(tmp_path / "adapter"))
    expected = TrainedReward(tmp_path / "adapter")(["Story 1"] * 2, [" abc", " d"])
    assert found[1]["rewards"] == pytest.approx(expected, rel=1e-3)
    data = ScoredGroups(str(tmp_path / "out.jsonl"), validation_size=1)
    data.load(byte_tokenizer())
    assert data.prompts(1).present.shape == (1, 2)


def nan_on_b(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Not a number for one completion; an error for another prompt."""
    if "Bad" in prompts:
        raise RuntimeError("cannot judge Bad")
    return [float("nan") if text == " b" else 1.0 for text in completions]


def test_rows_the_reward_fails_on_are_left_out_and_counted(
    score: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": prompt, "chosen": text, "rejected": " c"}
        for prompt, text in (("A", " a"), ("B", " b"), ("Bad", " a"), ("C", " a"))
    ]
    found = run(score, tmp_path, rows, reward=f"{__name__}.nan_on_b")
    assert [one["prompt"] for one in found] == ["A", "C"]
    assert "the reward failed: 2 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--reward", "lit_align.rewards.Vadr"], "no such name in Python"),
        (["--reward", "./none"], "is no trained reward"),
        (["--reward", f"{__name__}.nan_on_b"], "failed on every row"),
        (["--reward", f"{__name__}.letters", "--dataset", "none.jsonl"], "none.jsonl"),
        (["--reward", f"{__name__}.letters", "--model", "./none"], "there is no folder"),
    ],
)
def test_what_cannot_be_gets_one_message_and_no_file(
    score: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    rows = str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Bad", "chosen": " a", "rejected": " c"}]))
    assert score.main(["--dataset", rows, "--out", str(tmp_path / "out.jsonl"), *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_without_a_completion_are_dropped_and_counted(
    score: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "A", "completions": [" a"]}, {"prompt": "B", "completions": [" "]}]
    assert [one["prompt"] for one in run(score, tmp_path, rows)] == ["A"]
    assert "dropped, no completion: 1 rows" in capsys.readouterr().out


def test_a_file_that_exists_is_not_written_over(score: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(SystemExit):
        score.main(["--reward", f"{__name__}.letters", "--out", str(out)])
    assert out.read_text() == "mine"
