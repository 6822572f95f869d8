from __future__ import annotations

import pytest

from lit_align.data import OnPolicyData
from lit_align.data.formats import read_examples
from lit_align.data.pairs import as_pair
from lit_align.data.report import SplitReport
from lit_align.data.rows import DataError, Row, Source
from lit_align.data.transcripts import shorter_transcripts, transcript_messages

USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello"}
BAD = {"role": "assistant", "content": "Go"}
SYSTEM = {"role": "system", "content": "Be kind"}


def read(*rows: dict, columns: dict | None = None):
    report = SplitReport("d.jsonl", read=len(rows))
    source = Source("d.jsonl", [Row(n, f"d.jsonl:{n + 1}", fields) for n, fields in enumerate(rows)], [])
    return read_examples(source, columns, report), report


def one(*rows: dict, columns: dict | None = None):
    examples, report = read(*rows, columns=columns)
    assert report.dropped == {}
    assert len(examples) == 1
    return examples[0]


def dropped(*rows: dict) -> dict[str, int]:
    _, report = read(*rows)
    return {reason: tally.count for reason, tally in report.dropped.items()}


def problem(*rows: dict, columns: dict | None = None) -> str:
    with pytest.raises(DataError) as error:
        read(*rows, columns=columns)
    return str(error.value)


def test_plain_pairs_stay_as_they_are():
    example = one({"prompt": "Q: ", "chosen": "yes ", "rejected": " no", "extra": 3})
    assert (example.prompt, example.completions, example.rewards) == ("Q: ", ["yes ", " no"], None)
    assert (example.row, example.place, example.transcript) == (0, "d.jsonl:1", False)


def test_an_implicit_prompt_of_text_ends_before_the_last_shared_space():
    example = one({"chosen": "Q: 2 + 2? A: 4", "rejected": "Q: 2 + 2? A: 5"})
    assert (example.prompt, example.completions) == ("Q: 2 + 2? A:", [" 4", " 5"])
    # A shared first letter belongs to the word, hence to the completion.
    example = one({"chosen": "Tell me.\n\nSure", "rejected": "Tell me.\n\nSorry"})
    assert (example.prompt, example.completions) == ("Tell me.", ["\n\nSure", "\n\nSorry"])


def test_texts_without_a_shared_beginning_are_dropped():
    assert dropped({"chosen": "yes", "rejected": "no"}) == {"prompts differ": 1}


def test_a_transcript_is_split_at_its_last_assistant_marker():
    opening = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant:"
    example = one({"chosen": opening + " Gladly", "rejected": opening + " Gone"})
    assert (example.prompt, example.completions) == (opening, [" Gladly", " Gone"])
    assert example.transcript


def test_transcripts_whose_prompts_differ_are_dropped_and_counted():
    chosen = "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: C"
    rejected = "\n\nHuman: Hi\n\nAssistant: X\n\nHuman: B\n\nAssistant: D"
    _, report = read({"chosen": chosen, "rejected": rejected}, {"chosen": chosen, "rejected": chosen + "!"})
    assert report.dropped["prompts differ"].count == 1
    assert report.dropped["prompts differ"].places == ["d.jsonl:1"]


def test_an_explicit_prompt_may_be_a_transcript():
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    assert one({"prompt": prompt, "chosen": " a", "rejected": " b"}).transcript
    assert not one({"prompt": "Human: Hi", "chosen": " a", "rejected": " b"}).transcript


def test_transcript_messages_alternate():
    prompt = "\n\nHuman: Hi\n\nHuman: there \n\nAssistant: Yes?\nWell\n\nHuman: Tea?\n\nAssistant:"
    assert transcript_messages(prompt) == [
        {"role": "user", "content": "Hi\n\nthere"},
        {"role": "assistant", "content": "Yes?\nWell"},
        {"role": "user", "content": "Tea?"},
    ]
    assert shorter_transcripts(prompt) == [prompt[len("\n\nHuman: Hi") :], "\n\nHuman: Tea?\n\nAssistant:"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "Hello", "rejected": "Go"},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_messages_in_any_form_mean_the_same(row):
    example = one(row)
    assert (example.prompt, example.completions) == ([USER], [[GOOD], [BAD]])


def test_a_shared_beginning_of_messages_keeps_system_and_earlier_turns():
    turns = [SYSTEM, USER, GOOD, USER]
    example = one({"chosen": [*turns, GOOD], "rejected": [*turns, BAD]})
    assert (example.prompt, example.completions) == (turns, [[GOOD], [BAD]])


def test_conversations_that_part_early_are_dropped():
    rows = [
        {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, GOOD]},
        {"chosen": [GOOD], "rejected": [BAD]},
    ]
    assert dropped(*rows) == {"prompts differ": 2}


def test_scored_completions_keep_their_rewards():
    row = {"prompt": "Q", "completions": [" a", " b", " c"], "rewards": [1, 3.5, -2]}
    example = one(row)
    assert (example.completions, example.rewards) == ([" a", " b", " c"], [1.0, 3.5, -2.0])
    pair = as_pair(example, SplitReport("d"))
    assert pair is not None
    assert (pair.completions, pair.rewards) == ([" b", " c"], [3.5, -2.0])


def test_scored_completions_may_be_messages():
    example = one({"prompt": [USER], "completions": [[GOOD], "Go"], "rewards": [1, 0]})
    assert (example.prompt, example.completions) == ([USER], [[GOOD], [BAD]])


def test_an_empty_completion_leaves_its_group_and_ends_a_pair():
    examples, report = read(
        {"prompt": "Q", "completions": [" ", "b", "c"], "rewards": [9, 1, 2]},
        {"prompt": "Q", "completions": ["", "b"], "rewards": [9, 1]},
    )
    assert [(example.completions, example.rewards) for example in examples] == [(["b", "c"], [1.0, 2.0])]
    assert report.noted["empty completion left out of a group"].places == ["d.jsonl:1"]
    assert report.dropped["fewer than two completions"].places == ["d.jsonl:2"]
    assert dropped({"prompt": "Q", "chosen": "\n", "rejected": "b"}) == {"empty completion": 1}
    blank = {"role": "assistant", "content": " "}
    assert dropped({"prompt": [USER], "chosen": [GOOD], "rejected": [blank]}) == {"empty completion": 1}


def test_pairs_without_a_preference_are_dropped_and_counted():
    report = SplitReport("d")
    examples, _ = read(
        {"prompt": "Q", "completions": ["a", "b"], "rewards": [1, 1]},
        {"prompt": "Q", "completions": ["a", "a"], "rewards": [1, 2]},
    )
    assert [as_pair(example, report) for example in examples] == [None, None]
    assert {reason: tally.places for reason, tally in report.dropped.items()} == {
        "all rewards equal": ["d.jsonl:1"],
        "identical pair": ["d.jsonl:2"],
    }
    opening = "\n\nHuman: Hi\n\nAssistant: Yes"
    for row in ({"chosen": opening, "rejected": opening}, {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}):
        assert as_pair(one(row), report) is None
    assert report.dropped["identical pair"].count == 3
    assert dropped({"chosen": "the same", "rejected": "the same"}) == {"identical pair": 1}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b"}, 'field "rejected" is missing'),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, 'field "prompt" must be text or a list of'),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "not null"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "not a number"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, 'field "chosen" has no messages'),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, 'field "chosen"[0] must be a message'),
        ({"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "c"}, 'field "chosen"[0] must be a message'),
        (
            {"prompt": "a", "chosen": [{**GOOD, "content": None}], "rejected": "c"},
            '[0]["content"] must be text, not null',
        ),
        ({"prompt": "a", "chosen": [USER], "rejected": "c"}, 'a completion has role "user"; it must be "assistant"'),
        ({"prompt": [USER, GOOD], "chosen": "b", "rejected": "c"}, "must end with what is to be answered"),
        ({"prompt": "a", "chosen": "b\ud800", "rejected": "c"}, "half a surrogate pair at character 2"),
    ],
)
def test_a_bad_row_names_its_line_and_field(row, expected):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    message = problem(good, row)
    assert "d.jsonl: 1 bad rows of 2" in message
    assert "d.jsonl:2: " in message
    assert expected in message


def test_implicit_prompts_of_mixed_form_are_refused():
    assert "give both in one form" in problem({"chosen": "a b", "rejected": [USER, BAD]})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"completions": ["a", "b"], "rewards": [1]}, '2 entries in "completions" but 1 in "rewards"'),
        ({"completions": ["a", "b"], "rewards": [1, float("nan")]}, '"rewards"[1] must be a finite number, not nan'),
        ({"completions": ["a", "b"], "rewards": [True, 1]}, '"rewards"[0] must be a finite number, not true or false'),
        ({"completions": ["a", "b"], "rewards": ["1", 1]}, '"rewards"[0] must be a finite number, not text'),
        ({"completions": "a", "rewards": [1]}, 'field "completions" must be a list, not text'),
        ({"completions": ["a", 4], "rewards": [1, 2]}, '"completions"[1] must be text'),
    ],
)
def test_a_bad_group_names_its_entry(row, expected):
    assert "d.jsonl:1: " in problem({"prompt": "Q", **row})
    assert expected in problem({"prompt": "Q", **row})


def test_problems_of_reading_and_of_fields_are_shown_together():
    source = Source(
        "d.jsonl", [Row(1, "d.jsonl:2", {"prompt": "a", "chosen": "b", "rejected": 1})], ["d.jsonl:1: broken"]
    )
    with pytest.raises(DataError) as error:
        read_examples(source, None, SplitReport("d.jsonl"))
    assert "2 bad rows of 2" in str(error.value)
    assert "d.jsonl:1: broken" in str(error.value)
    assert "d.jsonl:2: " in str(error.value)


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="no rows"):
        read_examples(Source("d.jsonl", [], []), None, SplitReport("d.jsonl"))
    with pytest.raises(DataError, match=r"d.jsonl:1: broken"):
        read_examples(Source("d.jsonl", [], ["d.jsonl:1: broken"]), None, SplitReport("d.jsonl"))


def test_columns_are_renamed_and_a_taken_name_is_not_read_twice():
    row = {"question": "Q", "good": "a", "chosen": "b"}
    example = one(row, columns={"prompt": "question", "chosen": "good", "rejected": "chosen"})
    assert (example.prompt, example.completions) == ("Q", ["a", "b"])
    example = one({"rewards": "Q", "chosen": "a", "rejected": "b"}, columns={"prompt": "rewards"})
    assert (example.prompt, example.completions) == ("Q", ["a", "b"])


def test_wrong_columns_show_what_was_found_and_a_mapping_to_paste():
    message = problem({"question": "Q", "response_chosen": "a", "zzz": "b"})
    assert "found:  question, response_chosen, zzz" in message
    assert "prompt + chosen + rejected; chosen + rejected; prompt + completions + rewards" in message
    assert "columns: {prompt: question, chosen: response_chosen, rejected: <your column>}" in message


def test_a_mapping_to_paste_for_scored_completions():
    message = problem({"prompt": "Q", "responses": ["a"], "scores": [1]})
    assert "columns: {completions: responses, rewards: scores}" in message


def test_a_wrong_mapping_is_named():
    row = {"prompt": "Q", "good": "a", "bad": "b"}
    message = problem(row, columns={"chosen": "god"})
    assert 'has no column "god" for "chosen"; found: prompt, good, bad; did you mean "good"?' in message
    message = problem(row, columns={"winner": "good"})
    assert '"winner" is not a name of ours; accepted: prompt, chosen, rejected, completions, rewards' in message


def test_unpaired_data_is_recognised():
    assert "unpaired data" in problem({"prompt": "Q", "completion": "a", "label": True})


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


OPENING = [turn("system", "Be kind."), turn("user", "Q"), turn("assistant", "A"), turn("user", "More?")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q"}, "Q"),
        ({"prompt": "Q", "chosen": " yes", "rejected": " no"}, "Q"),
        (
            {
                "prompt": "More?",
                "chosen": [*OPENING, turn("assistant", "yes")],
                "rejected": [*OPENING, turn("assistant", "no")],
            },
            OPENING,
        ),
        (
            {"prompt": "Q", "chosen": [turn("assistant", "yes")], "rejected": [turn("assistant", "no")]},
            [turn("user", "Q")],
        ),
        ({"prompt": "More?", "messages": [*OPENING, turn("assistant", "yes")]}, OPENING),
        ({"prompt": "Q", "messages": [turn("user", "Q")]}, [turn("user", "Q")]),  # no answer, which is not read here
    ],
)
def test_a_prompt_alone_is_the_one_that_the_conversations_beside_it_answer(row, expected):
    """As pairs and demonstrations of the same rows have it, so that a model is asked alike by all of them."""
    source = Source("d.jsonl", [Row(0, "d.jsonl:1", row)], [])
    (found,) = read_examples(source, None, SplitReport("d.jsonl", read=1), OnPolicyData.formats)
    assert found.prompt == expected
    assert found.completions == []


def test_a_column_that_may_be_the_prompt_is_told_of(caplog):
    asked = {"question": "How?", "chosen": "Well: so", "rejected": "Well: not"}
    assert one(asked).prompt == "Well:"
    assert "set data.columns to {prompt: question}" in caplog.text
    caplog.clear()
    assert one(asked, columns={"prompt": "question"}).prompt == "How?"
    one({"chosen": "Well: so", "rejected": "Well: not"})
    assert caplog.text == ""


def test_fields_that_a_table_fills_with_nothing_do_not_tell_messages_apart():
    """A table has the same fields in all rows of a column; another column of it may have fewer."""
    filled = {**USER, "tool_calls": None}
    example = one({"prompt": [USER], "chosen": [filled, {**GOOD, "name": None}], "rejected": [filled, BAD]})
    assert (example.prompt, example.completions) == ([USER], [[GOOD], [BAD]])
