from __future__ import annotations

import pytest
import torch

from lit_align.data import Demonstrations
from lit_align.data.rows import DataError
from tests.data.conftest import CHATML, byte_tokenizer, everything, texts_of, validating, write_jsonl

USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind"}
SCORED = {"prompt": "Q", "completions": ["c", "a", "b", "d"], "rewards": [1, 3, 2, -1]}


def read(path, *rows: dict, **options):
    data = validating(Demonstrations, path, list(rows), **options)
    return everything(data), data.report.parts["train"]


def conversations(path, *rows: dict) -> list[list[str]]:
    """Prompt and completion of each row, as the chat template renders them."""
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    data = Demonstrations(str(write_jsonl(path / "a.jsonl", list(rows))), validation_size=0, max_dropped=0.9)
    data.load(tokenizer)
    assert data.report.parts["train"].dropped == {}
    batch = data.prompts(99)
    return [
        [tokenizer.decode(batch.prompt_ids[n][batch.prompt_mask[n]]), texts_of(batch)[n][0]]
        for n in range(len(batch.row))
    ]


def test_a_prompt_and_its_completion(tmp_path):
    batch, report = read(tmp_path, {"prompt": "Q", "completion": " a"}, {"prompt": "R", "completion": " bc"})
    assert texts_of(batch) == [[" a</s>"], [" bc</s>"]]
    assert batch.reward is None
    assert batch.present.tolist() == [[True], [True]]
    assert report.completions == {"completion": 2}
    # The prompt is 1 token; the completions are 2 and 3 with their ends.
    assert (report.tokens["prompt"]["max"], report.tokens["completion"]["max"]) == (1, 4)


HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [GOOD]},
        {"prompt": "Hi", "completion": GOOD},
        {"prompt": [USER], "completion": [USER, GOOD]},
        {"prompt": "Hi", "completion": [USER, GOOD]},
        {"messages": [USER, GOOD]},
        {"messages": [USER, GOOD, USER]},
    ],
)
def test_messages_in_any_form_mean_the_same(tmp_path, row):
    assert conversations(tmp_path, row) == [[HI, "Hello<|im_end|>"]]


def test_a_conversation_ends_with_its_last_assistant_turn(tmp_path):
    first = {"role": "assistant", "content": "Yes?"}
    [[prompt, completion]] = conversations(tmp_path, {"messages": [SYSTEM, USER, first, USER, GOOD]})
    begin = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    begin += "<|im_start|>assistant\nYes?<|im_end|>\n"
    assert (prompt, completion) == (begin + HI, "Hello<|im_end|>")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [([USER], "no assistant turn"), ([GOOD], "nothing before the assistant's turn")],
)
def test_conversations_without_prompt_or_completion_are_dropped(tmp_path, messages, reason):
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [USER, GOOD]}, {"messages": messages}])
    data = Demonstrations(str(path), validation_size=0, max_dropped=0.5)
    data.load(tokenizer)
    assert data.report.parts["train"].dropped[reason].places == ["a.jsonl:2"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": "Hi"}, 'field "messages" must be a list of {"role", "content"} messages, not text'),
        ({"messages": [{"role": "user"}]}, 'field "messages"[0] must be a message'),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            "an object with 'from', 'value': rename \"from\" to \"role\"",
        ),
        ({"messages": [USER, GOOD, GOOD]}, 'the prompt ends with a message of role "assistant"'),
        ({"prompt": "Q", "completion": None}, 'field "completion" must be text or a list of'),
        ({"prompt": [USER], "completion": [SYSTEM]}, 'a completion has role "system"; it must be "assistant"'),
    ],
)
def test_a_bad_row_names_its_line_and_field(tmp_path, row, expected):
    with pytest.raises(DataError) as error:
        read(tmp_path, row)
    assert "rows.jsonl:1: " in str(error.value)
    assert expected in str(error.value)


def test_empty_and_composite_completions_are_dropped(tmp_path):
    rows = [{"prompt": "Q", "completion": "a"}, {"prompt": "Q", "completion": " "}]
    rows.append({"prompt": [USER], "completion": [GOOD, USER, GOOD]})
    _, report = read(tmp_path, *rows, max_dropped=0.9)
    assert {reason: tally.places for reason, tally in report.dropped.items()} == {
        "empty completion": ["rows.jsonl:2"],
        "completion is not one message": ["rows.jsonl:3"],
    }


def test_the_chosen_of_the_pairs_that_preference_training_keeps(tmp_path):
    pairs = [("yes", "no"), ("same", "same"), ("good", " "), ("on", "off")]
    rows = [{"prompt": f"Q{n}", "chosen": pair[0], "rejected": pair[1]} for n, pair in enumerate(pairs)]
    batch, report = read(tmp_path, *rows, max_dropped=0.5)
    assert texts_of(batch) == [["yes</s>"], ["on</s>"]]
    assert {reason: tally.count for reason, tally in report.dropped.items()} == {
        "identical pair": 1,
        "empty completion": 1,
    }


def test_of_scored_completions_the_best_or_all_that_reach_a_threshold(tmp_path):
    other = {"prompt": "R", "completions": ["x", "y"], "rewards": [5, 5]}
    batch, report = read(tmp_path, SCORED, other)
    assert texts_of(batch) == [["a</s>"], ["x</s>"]]
    assert batch.reward is None
    assert report.noted["several best completions, the first taken"].places == ["rows.jsonl:2"]
    batch, report = read(tmp_path, SCORED, other, threshold=1)
    assert texts_of(batch) == [["a</s>", "b</s>", "c</s>"], ["x</s>", "y</s>"]]
    assert batch.present.tolist() == [[True, True, True], [True, True, False]]
    assert batch.reward is None
    assert report.completions == {"completion": 5}
    assert report.length_ratio is None


def test_rows_below_the_threshold_are_left_out_and_not_lost(tmp_path):
    low = {"prompt": "R", "completions": ["x", "y"], "rewards": [0, 1]}
    batch, report = read(tmp_path, low, low, low, SCORED, threshold=2.5, max_dropped=0)
    assert texts_of(batch) == [["a</s>"]]
    assert report.left_out["no reward reaches 2.5"].count == 3
    assert (report.kept, report.lost) == (1, 0)
    with pytest.raises(DataError, match="nothing is left of 1 rows") as error:
        read(tmp_path, SCORED, threshold=99)
    assert "no reward reaches 99: 1" in str(error.value)


def test_one_scored_completion_is_enough_and_none_is_not(tmp_path):
    rows = [{**SCORED, "completions": completions, "rewards": [1]} for completions in (["a"], [" "])]
    batch, report = read(tmp_path, *rows, max_dropped=0.5)
    assert texts_of(batch) == [["a</s>"]]
    assert report.dropped["no completion"].places == ["rows.jsonl:2"]


def test_a_repeated_text_is_imitated_once_and_equal_beginnings_stay(tmp_path):
    row = {"prompt": "Q", "completions": ["abcd", "abcd", "abce"], "rewards": [1, 1, 1]}
    batch, report = read(tmp_path, row, threshold=0)
    assert texts_of(batch) == [["abcd</s>", "abce</s>"]]
    assert report.noted["repeated completion left out of a group"].count == 1
    # Cut to three tokens both read "abc", which is still to be imitated.
    batch, report = read(tmp_path, row, threshold=0, max_length=4, max_prompt_length=1)
    assert texts_of(batch) == [["abc", "abc"]]
    assert report.dropped == {}


def test_good_labels_are_imitated_and_bad_ones_left_out(tmp_path):
    rows = [{"prompt": f"Q{n}", "completion": "abcd"[n], "label": n in (1, 3)} for n in range(4)]
    batch, report = read(tmp_path, *rows)
    assert texts_of(batch) == [["b</s>"], ["d</s>"]]
    assert batch.reward is None
    assert report.left_out["labelled bad"].places == ["rows.jsonl:1", "rows.jsonl:3"]
    assert report.lost == 0


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
        {"prompt": "Q", "completion": "a"},
        {"prompt": "Q", "completion": "a", "label": True},
    ],
)
def test_a_threshold_without_rewards_is_refused(tmp_path, row):
    with pytest.raises(DataError, match=r"data.threshold=2 needs scored completions, and rows.jsonl:1 has none"):
        read(tmp_path, row, threshold=2)


def test_scores_are_read_before_pairs_only_with_a_threshold(tmp_path):
    both = {**SCORED, "chosen": "yes", "rejected": "no"}
    assert texts_of(read(tmp_path, both)[0]) == [["yes</s>"]]
    assert texts_of(read(tmp_path, both, threshold=3)[0]) == [["a</s>"]]


def test_a_transcript_is_a_prompt(tmp_path):
    [[prompt, completion]] = conversations(tmp_path, {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello"})
    assert (prompt, completion) == (HI, "Hello<|im_end|>")


def test_padding_is_known_by_masks(tmp_path):
    batch, _ = read(tmp_path, {"prompt": "Q", "completion": "a"}, {"prompt": "QQQ", "completion": "abc"})
    assert torch.equal(batch.lengths, torch.tensor([[2], [4]]))
    assert batch.prompt_mask.sum(-1).tolist() == [1, 3]
