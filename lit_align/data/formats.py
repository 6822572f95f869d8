"""Recognise the format of rows and turn each into an example: a prompt, its completions, their rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lit_align.data.columns import rename
from lit_align.data.files import json_kind
from lit_align.data.messages import Message, Text, is_blank, shared_messages, shared_text, without_beginning
from lit_align.data.report import SplitReport
from lit_align.data.rows import DataError, Source, raise_bad_rows
from lit_align.data.transcripts import ASSISTANT, is_transcript, split_transcript


class Example(NamedTuple):
    """One prompt and its completions, as text or as messages alike.

    Attributes:
        row: Row in the source, see ``Row.number``.
        place: Where a person finds it.
        prompt: Text, or messages the last of which is not the assistant's.
        completions: For each completion its text, or a list of one message.
        rewards: One for each completion, larger is better; None for a pair, whose first completion is the better.
        transcript: Whether the prompt is an Anthropic-HH transcript.
    """

    row: int
    place: str
    prompt: Text
    completions: list[Text]
    rewards: list[float] | None
    transcript: bool = False


class _BadRow(Exception):
    """The row is malformed; the message says how."""


class _DroppedRow(Exception):
    """The row is sound but of no use; the message is the reason counted in the report."""


Parts = tuple[Text, list[Text], list[float] | None]


def read_examples(source: Source, columns: Mapping[str, str] | None, report: SplitReport) -> list[Example]:
    """Turn rows into examples; useless rows are dropped and counted, malformed ones raise together.

    Args:
        source: Rows as they were read.
        columns: Our names to the user's column names; None where they agree.
        report: Receives what was dropped and why.

    Raises:
        DataError: If the columns fit no format, or any row is malformed (the first 20 are shown).
    """
    if not source.rows:
        raise_bad_rows(source.name, source.problems, len(source.problems))
        raise DataError(f"{source.name}: no rows; check that the file is not empty and max_rows is at least 1")
    rows, found = rename(source, dict(columns or {}))
    parse = _parser(found)
    examples: list[Example] = []
    problems = list(source.problems)
    for row in rows:
        try:
            prompt, completions, rewards = parse(row.fields)
            example = _checked(Example(row.number, row.place, prompt, completions, rewards), report)
            examples.append(example)
        except _BadRow as problem:
            problems.append(f"{row.place}: {problem}")
        except _DroppedRow as reason:
            report.drop(str(reason), row.place)
    raise_bad_rows(source.name, problems, len(source.rows) + len(source.problems))
    return examples


def _parser(found: set[str]) -> Callable[[dict[str, Any]], Parts]:
    """The parser of a format; pairs win where a dataset also has scored completions."""
    if {"chosen", "rejected"} <= found:
        return _pair if "prompt" in found else _implicit_pair
    return _group


def _checked(example: Example, report: SplitReport) -> Example:
    """Drop what cannot be trained on: empty completions, and groups with fewer than two left."""
    kept = [number for number, text in enumerate(example.completions) if not is_blank(text)]
    if example.rewards is None and len(kept) < len(example.completions):
        raise _DroppedRow("empty completion")
    if len(kept) < 2:
        raise _DroppedRow("fewer than two completions")
    if len(kept) < len(example.completions):
        report.note("empty completion left out of a group", example.place)
    transcript = isinstance(example.prompt, str) and _awaits_assistant(example.prompt)
    rewards = None if example.rewards is None else [example.rewards[number] for number in kept]
    return example._replace(
        completions=[example.completions[number] for number in kept], rewards=rewards, transcript=transcript
    )


def _awaits_assistant(prompt: str) -> bool:
    return is_transcript(prompt) and prompt.rstrip().endswith(ASSISTANT)


def _pair(fields: dict[str, Any]) -> Parts:
    """prompt, chosen, rejected: each text or messages."""
    pair = [_text(fields, "chosen"), _text(fields, "rejected")]
    prompt, completions = _explicit(_text(fields, "prompt"), pair)
    return prompt, completions, None


def _group(fields: dict[str, Any]) -> Parts:
    """prompt, completions, rewards: K completions, each text or messages."""
    values, rewards = _list(fields, "completions"), _list(fields, "rewards")
    if len(values) != len(rewards):
        raise _BadRow(f'{len(values)} entries in "completions" but {len(rewards)} in "rewards"; give one reward each')
    for number, reward in enumerate(rewards):
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
            shown = reward if isinstance(reward, float) else json_kind(reward)
            raise _BadRow(f'"rewards"[{number}] must be a finite number, not {shown}')
    texts = [_as_text(value, f'"completions"[{number}]') for number, value in enumerate(values)]
    prompt, completions = _explicit(_text(fields, "prompt"), texts)
    return prompt, completions, [float(reward) for reward in rewards]


def _implicit_pair(fields: dict[str, Any]) -> Parts:
    """chosen and rejected that share a beginning, the prompt."""
    chosen, rejected = _text(fields, "chosen"), _text(fields, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_transcripts(chosen, rejected) or _split_texts(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise _BadRow('one of "chosen" and "rejected" is text, the other a list of messages; give both in one form')
    return *_split_messages([chosen, rejected]), None


def _split_transcripts(chosen: str, rejected: str) -> Parts | None:
    if not (is_transcript(chosen) and is_transcript(rejected)):
        return None
    (prompt, better), (other, worse) = split_transcript(chosen), split_transcript(rejected)
    if prompt != other:
        raise _DroppedRow("prompts differ")
    return prompt, [better, worse], None


def _split_texts(chosen: str, rejected: str) -> Parts:
    if chosen == rejected:
        raise _DroppedRow("identical pair")
    end = shared_text(chosen, rejected)
    if end == 0:
        raise _DroppedRow("prompts differ")
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
        raise _DroppedRow("prompts differ")
    if prompt[-1]["role"] == "assistant":
        raise _BadRow('the prompt ends with a message of role "assistant"; it must end with what is to be answered')
    for messages in completions:
        if messages[0]["role"] != "assistant":
            raise _BadRow(f'a completion has role "{messages[0]["role"]}"; it must be "assistant"')
    return prompt, list(completions)


def _messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _value(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise _BadRow(f'field "{name}" is missing')
    return fields[name]


def _list(fields: dict[str, Any], name: str) -> list[Any]:
    value = _value(fields, name)
    if not isinstance(value, list):
        raise _BadRow(f'field "{name}" must be a list, not {json_kind(value)}')
    return value


def _text(fields: dict[str, Any], name: str) -> Text:
    return _as_text(_value(fields, name), f'field "{name}"')


def _as_text(value: Any, name: str) -> Text:
    """Text as it is, messages checked; anything else, and half a surrogate pair, is a problem."""
    if isinstance(value, str):
        return _encodable(value, name)
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise _BadRow(f'{name} must be text or a list of {{"role", "content"}} messages, not {json_kind(value)}')
    if not messages:
        raise _BadRow(f"{name} has no messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise _BadRow(
                f'{name}[{number}] must be a message {{"role": ..., "content": ...}}, not {json_kind(message)}'
            )
        for key in ("role", "content"):
            if not isinstance(message[key], str):
                raise _BadRow(f'{name}[{number}]["{key}"] must be text, not {json_kind(message[key])}')
            _encodable(message[key], f'{name}[{number}]["{key}"]')
    return messages


def _encodable(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRow(
            f"{name} holds half a surrogate pair at character {error.start + 1}; write the character whole"
        ) from None
    return text
