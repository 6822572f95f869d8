from __future__ import annotations

import pytest

from lit_align import specials
from lit_align.data.formats import Example
from lit_align.data.report import SplitReport
from lit_align.data.rows import DataError
from lit_align.data.text import Limits, tokenize
from lit_align.errors import UserError
from tests.data.conftest import CHATML, COUNTING, STRICT, byte_tokenizer, spaced_tokenizer

ROOMY = Limits(10_000, 5_000)
END = "<|im_end|>"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def text_example(prompt: str, *completions: str, transcript: bool = False) -> Example:
    return Example(0, "d.jsonl:1", prompt, list(completions), None, transcript)


def chat_example(prompt: list[dict], *completions: str) -> Example:
    return Example(0, "d.jsonl:1", prompt, [[assistant(text)] for text in completions], None)


def run(example: Example, tokenizer, limits: Limits = ROOMY):
    report = SplitReport("d.jsonl", read=1)
    (group,) = tokenize([example], tokenizer, limits, report)
    return group, report


def texts(example: Example, tokenizer, limits: Limits = ROOMY) -> tuple[str, list[str]]:
    """What the ids of an example read, special tokens included."""
    group, _ = run(example, tokenizer, limits)
    return tokenizer.decode(group.prompt_ids), [tokenizer.decode(ids) for ids in group.completion_ids]


def test_text_is_tokenized_as_it_is_and_ended(tokenizer):
    assert texts(text_example("Q: ", " é b ", "c"), tokenizer) == ("Q: ", [" é b </s>", "c</s>"])
    group, _ = run(text_example("Q: ", " é", "c"), tokenizer)
    assert [len(ids) for ids in (group.prompt_ids, *group.completion_ids)] == [3, 4, 2]  # bytes, and one end


@pytest.mark.parametrize(
    ("post", "prompt"),
    [(None, "Q"), ("<s> $A", "<s>Q"), ("<s> $A </s>", "<s>Q"), ("$A </s>", "Q"), ("<s> <s> $A", None)],
)
def test_a_prompt_gets_what_the_tokenizer_puts_before_but_not_after(post, prompt):
    tokenizer = byte_tokenizer(post=post, bos_token="<s>")
    if prompt is None:
        with pytest.raises(DataError, match="two beginning-of-sequence"):
            run(text_example("Q", "a", "b"), tokenizer)
    else:
        assert texts(text_example("Q", "a", "b"), tokenizer) == (prompt, ["a</s>", "b</s>"])


def test_two_beginnings_of_sequence_are_an_error_with_place_and_remedy():
    tokenizer = byte_tokenizer(post="<s> $A", bos_token="<s>")
    with pytest.raises(DataError) as error:
        run(text_example("<s>Q", "a", "b"), tokenizer)
    message = str(error.value)
    assert "d.jsonl:1: " in message
    assert '"<s>" (id 256)' in message
    assert "remove it from the text" in message


def test_a_template_that_doubles_the_beginning_is_an_error():
    tokenizer = byte_tokenizer("<s><s>" + CHATML, eos=END, bos_token="<s>")
    with pytest.raises(DataError, match="two beginning-of-sequence"):
        run(chat_example([user("Hi")], "a", "b"), tokenizer)


def test_rendered_text_gets_no_further_special_tokens():
    tokenizer = byte_tokenizer("<s>" + CHATML, eos=END, bos_token="<s>", post="<s> $A </s>")
    prompt, completions = texts(chat_example([user("Hi")], "a", "b"), tokenizer)
    assert prompt == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert completions == ["a<|im_end|>", "b<|im_end|>"]


@pytest.mark.parametrize("written", ["a", "a</s>", "a</s></s>", "a</s>\n"])
def test_the_end_of_a_text_is_there_exactly_once(tokenizer, written):
    assert texts(text_example("Q", written, "b"), tokenizer)[1] == ["a</s>", "b</s>"]


def test_the_end_is_trained_when_it_is_also_the_padding():
    tokenizer = byte_tokenizer(pad_token="</s>")
    assert texts(text_example("Q", "a", "b"), tokenizer)[1] == ["a</s>", "b</s>"]


def test_what_a_template_writes_after_the_end_is_left_off():
    # CHATML writes a line break after <|im_end|>; where that is not the end of sequence, the end follows it.
    assert texts(chat_example([user("Hi")], "a\n", "b"), byte_tokenizer(CHATML, eos=END))[1] == [f"a\n{END}", f"b{END}"]
    assert texts(chat_example([user("Hi")], "a", "b"), byte_tokenizer(CHATML, eos="</s>"))[1][0] == f"a{END}</s>"


def test_no_end_of_sequence_is_an_error_with_a_remedy():
    with pytest.raises(UserError, match=r"no end-of-sequence token.*set eos_token in its tokenizer_config.json"):
        run(text_example("Q", "a", "b"), byte_tokenizer(eos=None))


def test_text_prompts_stay_text_with_a_chat_tokenizer():
    assert texts(text_example("Q", "a", "b"), byte_tokenizer(CHATML, eos=END)) == ("Q", [f"a{END}", f"b{END}"])


def test_messages_without_a_template_are_an_error_with_a_remedy(tokenizer):
    with pytest.raises(DataError) as error:
        run(chat_example([user("Hi")], "a", "b"), tokenizer)
    assert "d.jsonl:1: the row holds messages" in str(error.value)
    assert "has no chat template" in str(error.value)
    assert "use an instruction-tuned model" in str(error.value)


def test_a_transcript_becomes_messages_where_there_is_a_template(tokenizer):
    prompt = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant:"
    example = text_example(prompt, " Gladly ", " No", transcript=True)
    assert texts(example, tokenizer) == (prompt, [" Gladly </s>", " No</s>"])
    rendered, completions = texts(example, byte_tokenizer(CHATML, eos=END))
    assert rendered == (
        f"<|im_start|>user\nHi{END}\n<|im_start|>assistant\nYes?{END}\n<|im_start|>user\nTea?{END}\n<|im_start|>assistant\n"
    )
    assert completions == [f"Gladly{END}", f"No{END}"]


def test_a_transcript_that_ends_with_two_assistant_turns_is_dropped_for_a_template():
    example = text_example("\n\nHuman: Hi\n\nAssistant: Yes?\n\nAssistant:", " a", " b", transcript=True)
    report = SplitReport("d", read=1)
    assert tokenize([example], byte_tokenizer(CHATML, eos=END), ROOMY, report) == []
    assert report.dropped["no human turn before the completion"].places == ["d.jsonl:1"]


def test_a_template_that_rewrites_the_prompt_shows_the_differing_text():
    with pytest.raises(DataError) as error:
        run(chat_example([user("Hi")], "a", "b"), byte_tokenizer(COUNTING, eos=END))
    message = str(error.value)
    assert "d.jsonl:1: " in message
    assert "From character 0 the prompt reads '1 messages" in message
    assert "the whole conversation '2 messages" in message
    assert "give prompts and completions as plain text" in message


def test_a_conversation_the_template_refuses_is_named():
    tokenizer = byte_tokenizer(STRICT, eos=END)
    with pytest.raises(DataError, match=r"d.jsonl:1: the chat template refuses the conversation: roles must alternate"):
        run(chat_example([user("Hi"), user("there")], "a", "b"), tokenizer)


def test_a_long_text_prompt_loses_its_beginning_and_keeps_the_first_token():
    tokenizer = byte_tokenizer(post="<s> $A", bos_token="<s>")
    example = text_example("0123456789", "a", "b")
    group, report = run(example, tokenizer, Limits(20, 5))
    assert tokenizer.decode(group.prompt_ids) == "<s>6789"
    assert report.noted["prompt cut on the left"].places == ["d.jsonl:1"]
    group, report = run(example, tokenizer, Limits(20, 11))
    assert tokenizer.decode(group.prompt_ids) == "<s>0123456789"
    assert report.noted == {}


def test_no_room_for_a_prompt_is_an_error_with_the_value_and_remedy():
    tokenizer = byte_tokenizer(post="<s> $A", bos_token="<s>")
    with pytest.raises(DataError, match=r"d.jsonl:1: max_prompt_length=1 leaves no room.*set max_prompt_length to 2"):
        run(text_example("Q", "a", "b"), tokenizer, Limits(20, 1))


def test_an_empty_prompt_without_any_token_is_dropped(tokenizer):
    report = SplitReport("d", read=1)
    assert tokenize([text_example("", "a", "b")], tokenizer, ROOMY, report) == []
    assert report.dropped["empty prompt"].places == ["d.jsonl:1"]
    assert texts(text_example("", "a", "b"), byte_tokenizer(post="<s> $A"))[0] == "<s>"


# In CHATML a message costs 1 + role + 1 + content + 1 + 1 tokens; the opening of the answer costs 11.
def cost(*messages: dict) -> int:
    return sum(4 + len(message["role"]) + len(message["content"]) for message in messages) + 11


CONVERSATION = [
    {"role": "system", "content": "Be kind"},
    user("One"),
    assistant("Two"),
    user("Three"),
    assistant("Four"),
    user("Five"),
]


@pytest.mark.parametrize(
    ("kept", "spare"),
    [
        (CONVERSATION, 0),
        ([CONVERSATION[0], *CONVERSATION[3:]], 0),
        ([CONVERSATION[0], *CONVERSATION[3:]], 5),
        ([CONVERSATION[0], CONVERSATION[5]], 0),
        ([CONVERSATION[5]], 0),
    ],
)
def test_a_long_conversation_loses_its_first_turns_and_keeps_its_system_message(kept, spare):
    tokenizer = byte_tokenizer(CHATML, eos=END)
    limits = Limits(1000, cost(*kept) + spare)
    group, report = run(chat_example(CONVERSATION, "a", "b"), tokenizer, limits)
    assert tokenizer.decode(group.prompt_ids) == (
        "".join(f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in kept) + "<|im_start|>assistant\n"
    )
    assert len(group.prompt_ids) == cost(*kept)
    assert set(report.noted) == (set() if kept == CONVERSATION else {"prompt lost its first turns"})


def test_a_last_message_over_the_limit_is_cut_at_a_token():
    tokenizer = byte_tokenizer(CHATML, eos=END)
    example = chat_example([user("Seven"), assistant("x"), user("0123456789")], "a", "b")
    group, report = run(example, tokenizer, Limits(90, 18))
    # 11 tokens open the answer, 2 end the message, 5 are left of it.
    assert tokenizer.decode(group.prompt_ids) == f"56789{END}\n<|im_start|>assistant\n"
    assert set(report.noted) == {"prompt cut on the left"}


def test_a_long_transcript_loses_turns_at_a_human_one(tokenizer):
    last = "\n\nHuman: Tea?\n\nAssistant:"
    example = text_example("\n\nHuman: Hi\n\nAssistant: Yes?" + last, " a", " b", transcript=True)
    group, report = run(example, tokenizer, Limits(200, len(last) + 3))
    assert tokenizer.decode(group.prompt_ids) == last
    assert set(report.noted) == {"prompt lost its first turns"}


def test_a_long_completion_is_cut_on_the_right_without_an_end(tokenizer):
    group, report = run(text_example("0123456789", "abcdefgh", "abcd"), tokenizer, Limits(9, 4))
    assert tokenizer.decode(group.prompt_ids) == "6789"
    assert [tokenizer.decode(ids) for ids in group.completion_ids] == ["abcde", "abcd</s>"]
    assert {what: tally.count for what, tally in report.noted.items()} == {
        "prompt cut on the left": 1,
        "completion cut on the right": 1,
    }


def test_a_short_prompt_leaves_its_room_to_the_completion(tokenizer):
    group, report = run(text_example("0", "abcdefg", "b"), tokenizer, Limits(9, 4))
    assert tokenizer.decode(group.completion_ids[0]) == "abcdefg</s>"
    assert report.noted == {}


def test_completions_that_cutting_makes_equal_are_dropped(tokenizer):
    report = SplitReport("d", read=1)
    assert tokenize([text_example("0123", "abcdefX", "abcdefY")], tokenizer, Limits(8, 4), report) == []
    assert report.dropped["identical after tokenization and cutting"].places == ["d.jsonl:1"]


@pytest.mark.parametrize("normalizes", [False, True])
def test_a_completion_is_read_as_the_continuation_of_a_text(normalizes):
    tokenizer = spaced_tokenizer(normalizes)
    group, _ = run(text_example("Q", "Hello", " Hello"), tokenizer)
    tokens = [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in (group.prompt_ids, *group.completion_ids)]
    assert tokens == [["▁", "Q"], [*"Hello", "</s>"], ["▁", *"Hello", "</s>"]]


def test_groups_keep_rows_rewards_and_order(tokenizer):
    examples = [
        Example(7, "d:8", "A", ["a", "bb", "ccc"], [3.0, 1.0, 2.0]),
        Example(3, "d:4", "B", ["x", "y"], None),
    ]
    first, second = tokenize(examples, tokenizer, ROOMY, SplitReport("d", read=2))
    assert (first.row, first.rewards, [len(ids) for ids in first.completion_ids]) == (7, [3.0, 1.0, 2.0], [2, 3, 4])
    assert (second.row, second.rewards, tokenizer.decode(second.completion_ids[1])) == (3, None, "y</s>")


@pytest.mark.parametrize("alone", ["</s>", " </s></s>\n"])
def test_a_completion_that_is_the_end_alone_is_empty(tokenizer, alone):
    report = SplitReport("d.jsonl", read=4)
    pair = text_example("Q: ", "yes", alone)
    scored = text_example("Q: ", "yes", alone, "no")._replace(rewards=[1.0, 2.0, 3.0])
    tied = scored._replace(rewards=[1.0, 2.0, 1.0])
    unjudged = scored._replace(rewards=None)  # such as those that a reward is still to judge
    groups = tokenize([pair, scored, tied, unjudged], tokenizer, ROOMY, report)
    for group in groups:
        assert [tokenizer.decode(ids) for ids in group.completion_ids] == ["yes</s>", "no</s>"]
    assert [group.rewards for group in groups] == [[1.0, 3.0], None]
    dropped = {reason: tally.count for reason, tally in report.dropped.items()}
    assert dropped == {"empty completion": 1, "all rewards equal": 1}


def test_many_texts_are_tokenized_some_at_a_time(tokenizer, monkeypatch):
    written = [f"text {number}" for number in range(7)]
    whole = specials.ids_of(tokenizer, written)
    monkeypatch.setattr(specials, "AT_ONCE", 3)
    assert specials.ids_of(tokenizer, written) == whole
    assert [tokenizer.decode(ids) for ids in whole] == written
