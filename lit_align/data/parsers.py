"""Turn the fields of a row of each kind into a prompt, its completions and their rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_align.data.fields import BadRow, DroppedRow, as_text, label_of, list_of, messages_of, rewards_of, text_of
from lit_align.data.messages import Message, Text, shared_messages, shared_text, without_beginning
from lit_align.data.transcripts import is_transcript, split_transcript

Parts = tuple[Text, list[Text], list[float] | None]
"""Prompt, completions, and one reward for each or None."""


def pair(fields: dict[str, Any]) -> Parts:
    """prompt, chosen, rejected: each text or messages."""
    texts = [text_of(fields, "chosen"), text_of(fields, "rejected")]
    prompt, completions = _explicit(text_of(fields, "prompt"), texts)
    return prompt, completions, None


def scored(fields: dict[str, Any]) -> Parts:
    """prompt, completions, rewards: K completions, each text or messages."""
    values, rewards = list_of(fields, "completions"), list_of(fields, "rewards")
    if len(values) != len(rewards):
        raise BadRow(f'{len(values)} entries in "completions" but {len(rewards)} in "rewards"; give one reward each')
    texts = [as_text(value, f'"completions"[{number}]') for number, value in enumerate(values)]
    prompt, completions = _explicit(text_of(fields, "prompt"), texts)
    return prompt, completions, rewards_of(fields, "rewards")


def labelled(fields: dict[str, Any]) -> Parts:
    """prompt, completion, label: one completion with the reward +1 if it is good, -1 if it is bad."""
    label = label_of(fields, "label")
    prompt, completions, _ = demonstration(fields)
    return prompt, completions, [1.0 if label else -1.0]


def demonstration(fields: dict[str, Any]) -> Parts:
    """prompt, completion: each text or messages."""
    prompt, completions = _explicit(text_of(fields, "prompt"), [text_of(fields, "completion")])
    return prompt, completions, None


def prompt(fields: dict[str, Any]) -> Parts:
    """prompt alone: text or messages; text beside conversations is the one they answer, as a pair has it."""
    text, _ = _explicit(text_of(fields, "prompt"), [])
    if isinstance(text, str) and (whole := _conversations(fields)) is not None:
        try:
            return whole(fields)[0], [], None
        except DroppedRow:  # for the sake of its completions, which are not read here
            return _messages(text, "user"), [], None
    return text, [], None


def _conversations(fields: dict[str, Any]) -> Callable[[dict[str, Any]], Parts] | None:
    """What reads the conversations of a row, if it has any."""
    if isinstance(fields.get("chosen"), list) and isinstance(fields.get("rejected"), list):
        return pair
    return conversation if isinstance(fields.get("messages"), list) else None


def conversation(fields: dict[str, Any]) -> Parts:
    """messages: the last one of the assistant is the completion, those before it the prompt; any after it go."""
    messages = messages_of(fields, "messages")
    last = max((number for number, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if not last:
        raise DroppedRow("no assistant turn" if last is None else "nothing before the assistant's turn")
    return *_conversation(messages[:last], [[messages[last]]]), None


def implicit_pair(fields: dict[str, Any]) -> Parts:
    """chosen and rejected that share a beginning, the prompt."""
    chosen, rejected = text_of(fields, "chosen"), text_of(fields, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_transcripts(chosen, rejected) or _split_texts(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRow('one of "chosen" and "rejected" is text, the other a list of messages; give both in one form')
    return *_split_messages([chosen, rejected]), None


def _split_transcripts(chosen: str, rejected: str) -> Parts | None:
    if not (is_transcript(chosen) and is_transcript(rejected)):
        return None
    (prompt, better), (other, worse) = split_transcript(chosen), split_transcript(rejected)
    if prompt != other:
        raise DroppedRow("prompts differ")
    return prompt, [better, worse], None


def _split_texts(chosen: str, rejected: str) -> Parts:
    if chosen == rejected:
        raise DroppedRow("identical pair")
    end = shared_text(chosen, rejected)
    if end == 0:
        raise DroppedRow("prompts differ")
    return chosen[:end], [chosen[end:], rejected[end:]], None


def _explicit(prompt: Text, completions: list[Text]) -> tuple[Text, list[Text]]:
    """Bring a prompt and its completions to one form: all text, or messages as soon as one of them is."""
    if isinstance(prompt, str) and all(isinstance(text, str) for text in completions):
        return prompt, completions
    conversations = [_messages(text, "assistant") for text in completions]
    if isinstance(prompt, str) and conversations and all(len(messages) > 1 for messages in conversations):
        return _split_messages(conversations)  # the prompt is repeated at the head of each conversation
    opening = _messages(prompt, "user")
    return _conversation(opening, [without_beginning(messages, opening) for messages in conversations])


def _split_messages(conversations: list[list[Message]]) -> tuple[Text, list[Text]]:
    first = conversations[0]
    end = min(shared_messages(first, other) for other in conversations[1:] or [first])
    return _conversation(first[:end], [messages[end:] for messages in conversations])


def _conversation(prompt: list[Message], completions: list[list[Message]]) -> tuple[Text, list[Text]]:
    if not prompt or any(len(messages) != 1 for messages in completions):
        raise DroppedRow("prompts differ" if len(completions) > 1 else "completion is not one message")
    if prompt[-1]["role"] == "assistant":
        raise BadRow('the prompt ends with a message of role "assistant"; it must end with what is to be answered')
    for messages in completions:
        if messages[0]["role"] != "assistant":
            raise BadRow(f'a completion has role "{messages[0]["role"]}"; it must be "assistant"')
    return prompt, list(completions)


def _messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text
