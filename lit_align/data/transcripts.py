r"""Anthropic-HH transcripts: whole conversations as one text, ``\n\nHuman: ...\n\nAssistant: ...``."""

from __future__ import annotations

import re

from lit_align.data.messages import Message

ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    """Whether a text is a transcript: it begins with a human turn and has an assistant turn."""
    return text.lstrip().startswith("Human:") and ASSISTANT in text


def split_transcript(text: str) -> tuple[str, str]:
    """Split at the last assistant marker.

    Returns:
        The prompt, marker included, and the completion, which keeps its leading space.
    """
    end = text.rindex(ASSISTANT) + len(ASSISTANT)
    return text[:end], text[end:]


def transcript_messages(prompt: str) -> list[Message]:
    """The messages of a prompt whose last turn, the assistant's, is still to be written.

    Turns lose the space around them. Neighbouring turns of one role become one, as most templates want roles to
    alternate.
    """
    pieces = _TURN.split(prompt.strip())[1:]
    messages: list[Message] = []
    for speaker, content in zip(pieces[0:-2:2], pieces[1:-2:2], strict=True):
        role, content = _ROLES[speaker], content.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content
        else:
            messages.append({"role": role, "content": content})
    return messages


def shorter_transcripts(prompt: str) -> list[str]:
    """The same prompt without its first turns, longest first; each begins with a human turn."""
    starts = [match.start() for match in _TURN.finditer(prompt) if match[1] == "Human"]
    return [prompt[start:] for start in starts[1:]]
