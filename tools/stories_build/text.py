"""Cleaning sampled stories, cutting them into sentences, and choosing the opening that becomes a prompt."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from typing import NamedTuple

_TYPOGRAPHY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
_PLAIN = re.compile(r"[A-Za-z0-9 .,!?'\"\-:;]+")
_BOUNDARY = re.compile(r"[.!?]+[\"']?(?=\s|$)")


class Story(NamedTuple):
    """A cleaned story.

    Attributes:
        sentences: Whole sentences, in order; joined by single spaces they are the story.
        ended: True if the teacher ended the story, False if the sample was cut at its token budget.
    """

    sentences: tuple[str, ...]
    ended: bool

    @property
    def text(self) -> str:
        """The story on one line."""
        return " ".join(self.sentences)


def sentences(text: str) -> list[str]:
    """Whole sentences of a text on one line; a tail without closing punctuation is left out.

    A full stop inside an open quotation ends nothing, nor does one before a lower-case word.
    """
    found, start = [], 0
    for match in _BOUNDARY.finditer(text):
        sentence, rest = text[start : match.end()], text[match.end() :].lstrip()
        if sentence.count('"') % 2 == 0 and not rest[:1].islower():
            found.append(sentence.strip())
            start = match.end()
    return found


def clean(text: str, ended: bool) -> Story | None:
    """A story in plain characters and whole sentences, or None for one that is garbled or too short.

    Args:
        text: Decoded sample, special tokens removed.
        ended: Whether the teacher ended it.
    """
    line = " ".join(text.translate(_TYPOGRAPHY).split())
    found = sentences(line)
    whole = " ".join(found)
    complete = ended and len(whole) >= len(line) - 1
    usable = len(found) >= 3 and line[:1].isupper() and _PLAIN.fullmatch(whole) is not None
    # The lower bound on the length drops lists of fragments, the upper one sentences that run on.
    usable = usable and all(2 <= len(sentence.split()) <= 40 for sentence in found)
    return Story(tuple(found), complete) if usable else None


def scene_length(story: Story) -> int | None:
    """How many sentences of a story make its scene, or None if none fits in 10 to 34 words.

    Two stories that begin with the same scene get the same answer, so that holding a scene out holds out every story
    that begins with it: the least number of words depends on the first sentence alone.
    """
    least = 10 + zlib.crc32(story.sentences[0].encode()) % 12
    words = 0
    for count, sentence in enumerate(story.sentences, 1):
        words += len(sentence.split())
        if words >= least:
            return count if words <= 34 else None
    return None


def scene(story: Story) -> str | None:
    """The opening of a story that serves as a prompt, or None."""
    count = scene_length(story)
    return None if count is None else " ".join(story.sentences[:count])


def by_scene(stories: Iterable[Story]) -> dict[str, list[Story]]:
    """Stories under their scenes, in order of first appearance; stories without a scene are left out."""
    groups: dict[str, list[Story]] = {}
    for story in stories:
        if (opening := scene(story)) is not None:
            groups.setdefault(opening, []).append(story)
    return groups


def held_out(opening: str) -> bool:
    """Whether a scene belongs to validation: one in ten does, whatever else was sampled."""
    return zlib.crc32(b"validation " + opening.encode()) % 10 == 0
