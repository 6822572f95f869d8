"""Conversations as lists of messages, ``{"role": ..., "content": ...}``, and how they share a beginning."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
Text = str | list[Message]


def shared_messages(first: list[Message], second: list[Message]) -> int:
    """How many leading messages two conversations share, at most all but the last of either."""
    most = min(len(first), len(second)) - 1
    return next((number for number in range(most) if first[number] != second[number]), max(most, 0))


def shared_text(first: str, second: str) -> int:
    """Characters of the beginning two texts share, cut back to before the last white space.

    The white space belongs to the completions, so that their first tokens are those of a word in running text.
    """
    most = min(len(first), len(second))
    end = next((place for place in range(most) if first[place] != second[place]), most)
    while end > 0 and not first[end - 1].isspace():
        end -= 1
    while end > 0 and first[end - 1].isspace():
        end -= 1
    return end


def without_beginning(messages: list[Message], beginning: list[Message]) -> list[Message]:
    """The messages after ``beginning`` where they begin with it, else all."""
    return messages[len(beginning) :] if messages[: len(beginning)] == beginning else messages


def is_blank(text: Text) -> bool:
    """Whether a completion says nothing."""
    return not (text if isinstance(text, str) else "".join(message["content"] for message in text)).strip()


def shorter_conversations(messages: list[Message]) -> list[list[Message]]:
    """The same conversation without its first messages, longest first; each keeps a leading system message and begins
    with a user's.

    Where there is a system message, the last one comes a second time without it.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    rest = messages[len(system) :]
    starts = [number for number, message in enumerate(rest) if message["role"] == "user" and number > 0]
    shorter = [system + rest[start:] for start in starts]
    last = rest[starts[-1] :] if starts else rest
    return [*shorter, last] if system and last else shorter
