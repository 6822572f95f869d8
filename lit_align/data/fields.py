"""Read the fields of a row by what they must be: text, messages, a list, rewards, a label."""

from __future__ import annotations

import math
from typing import Any

from lit_align.data.files import json_kind
from lit_align.data.messages import Message, Text


class BadRow(Exception):
    """The row is malformed; the message says how."""


class DroppedRow(Exception):
    """The row is sound but of no use; the message is the reason counted in the report."""


def value_of(fields: dict[str, Any], name: str) -> Any:
    """A field of any kind.

    Raises:
        BadRow: If it is missing; the functions below raise it as well where the field is not what they read.
    """
    if name not in fields:
        raise BadRow(f'field "{name}" is missing')
    return fields[name]


def list_of(fields: dict[str, Any], name: str) -> list[Any]:
    """A field that is a list."""
    value = value_of(fields, name)
    if not isinstance(value, list):
        raise BadRow(f'field "{name}" must be a list, not {json_kind(value)}')
    return value


def text_of(fields: dict[str, Any], name: str) -> Text:
    """A field that is text or messages."""
    return as_text(value_of(fields, name), f'field "{name}"')


def rewards_of(fields: dict[str, Any], name: str) -> list[float]:
    """A field that is a list of finite numbers."""
    rewards = list_of(fields, name)
    for number, reward in enumerate(rewards):
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
            shown = reward if isinstance(reward, float) else json_kind(reward)
            raise BadRow(f'"{name}"[{number}] must be a finite number, not {shown}')
    return [float(reward) for reward in rewards]


def label_of(fields: dict[str, Any], name: str) -> bool:
    """A field that says good or bad: true or false, or 1 or 0."""
    label = value_of(fields, name)
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        shown = label if isinstance(label, int | float) else json_kind(label)
        raise BadRow(f'field "{name}" must be true or false (or 1 or 0), not {shown}')
    return bool(label)


def messages_of(fields: dict[str, Any], name: str) -> list[Message]:
    """A field that is a list of messages."""
    messages = text_of(fields, name)
    if isinstance(messages, str):
        raise BadRow(f'field "{name}" must be a list of {{"role", "content"}} messages, not text')
    return messages


def as_text(value: Any, name: str) -> Text:
    """Text as it is, messages checked and without their empty fields, which a table gives to all that one row has.

    Raises:
        BadRow: If it is anything else, or holds half a surrogate pair.
    """
    if isinstance(value, str):
        return _encodable(value, name)
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise BadRow(f'{name} must be text or a list of {{"role", "content"}} messages, not {json_kind(value)}')
    if not messages:
        raise BadRow(f"{name} has no messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadRow(
                f'{name}[{number}] must be a message {{"role": ..., "content": ...}}, not {_described(message)}'
            )
        for key in ("role", "content"):
            if not isinstance(message[key], str):
                raise BadRow(f'{name}[{number}]["{key}"] must be text, not {json_kind(message[key])}')
            _encodable(message[key], f'{name}[{number}]["{key}"]')
    return [{key: held for key, held in message.items() if held is not None} for message in messages]


def _described(message: Any) -> str:
    """What stands where a message should."""
    if not isinstance(message, dict):
        return json_kind(message)
    found = f"an object with {', '.join(map(repr, message)) or 'nothing'}"
    if {"from", "value"} <= message.keys():
        found += ': rename "from" to "role" (human to user, gpt to assistant) and "value" to "content"'
    return found


def _encodable(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{name} holds half a surrogate pair at character {error.start + 1}; write the character whole"
        ) from None
    return text
