"""What a tokenizer does around a text: what it puts before it, how it marks the end, how it reads its first word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lit_align.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = ("a", "0", "the")
_ANCHOR = "\n"
AT_ONCE = 2048
"""Texts in one call of a tokenizer: enough for all cores. Until it returns it takes 128 bytes for each token."""


class Specials(NamedTuple):
    """What a tokenizer adds.

    Attributes:
        before: Ids put before a text, such as the beginning of sequence; what it would put after a prompt is left off.
        eos_id: Id of the end of sequence.
        eos: Its text.
        bos_id: Id of the beginning of sequence, or None.
        bos: Its text, or None.
        anchor: Ids of a line break where the tokenizer adds a space to the first word of a text, else None. A
            completion is then read after a line break, so that it is not taken for the beginning of a text.
    """

    before: list[int]
    eos_id: int
    eos: str
    bos_id: int | None
    bos: str | None
    anchor: list[int] | None


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], specials: bool = False) -> list[list[int]]:
    """Token ids of several texts.

    Args:
        tokenizer: Any tokenizer of transformers.
        texts: May be empty.
        specials: Whether the tokenizer may add its special tokens.
    """
    found: list[list[int]] = []
    for start in range(0, len(texts), AT_ONCE):
        some = list(texts[start : start + AT_ONCE])
        encoded = tokenizer(
            some, add_special_tokens=specials, return_attention_mask=False, truncation=False, verbose=False
        )
        found += [list(ids) for ids in encoded["input_ids"]]
    return found


def find_specials(tokenizer: PreTrainedTokenizerBase) -> Specials:
    """Probe a tokenizer once.

    Raises:
        UserError: If it has no end of sequence, since a model cannot learn to stop without one.
    """
    eos_id, eos = tokenizer.eos_token_id, tokenizer.eos_token
    if eos_id is None or eos is None:
        raise UserError(
            f'the tokenizer of "{tokenizer.name_or_path}" has no end-of-sequence token, so completions could not end; '
            'set eos_token in its tokenizer_config.json, for example "</s>", to a token of its vocabulary'
        )
    return Specials(
        before=_before(tokenizer),
        eos_id=int(eos_id),
        eos=str(eos),
        bos_id=tokenizer.bos_token_id,
        bos=tokenizer.bos_token,
        anchor=_anchor(tokenizer),
    )


def unended(text: str, specials: Specials, strip: bool = False) -> str:
    """The text without the end of sequence it may be written with, which is added as an id instead.

    Args:
        text: A completion.
        specials: Of the tokenizer.
        strip: Whether white space at the very end goes as well, as a template's line break after a turn.
    """
    bare = text.rstrip()
    if not bare.endswith(specials.eos):
        return bare if strip else text
    while bare.rstrip().endswith(specials.eos):
        bare = bare.rstrip().removesuffix(specials.eos)
    return bare


def completion_ids(
    tokenizer: PreTrainedTokenizerBase,
    specials: Specials,
    texts: Sequence[str],
    encode: Callable[[PreTrainedTokenizerBase, Sequence[str]], list[list[int]]] = ids_of,
) -> list[list[int]]:
    """Token ids of completions, each read as the continuation of a text, without special tokens.

    A tokenizer that puts a space before the first word of a text must not do so in the middle of one.

    Args:
        tokenizer: The policy's.
        specials: What it adds.
        texts: The completions.
        encode: From texts to token ids without special tokens.
    """
    if specials.anchor is None:
        return encode(tokenizer, texts)
    anchored = encode(tokenizer, [_ANCHOR + text for text in texts])
    size = len(specials.anchor)
    plain = encode(tokenizer, texts) if any(ids[:size] != specials.anchor for ids in anchored) else anchored
    return [ids[size:] if ids[:size] == specials.anchor else alone for ids, alone in zip(anchored, plain, strict=True)]


def _anchor(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The ids of a line break, if a word after one is not the word at the beginning of a text."""
    anchor, first, after = ids_of(tokenizer, [_ANCHOR, "a", _ANCHOR + "a"])
    size = len(anchor)
    return anchor if anchor and after[:size] == anchor and after[size:] != first else None


def _before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids before those of a text, by tokenizing one with and without special tokens."""
    for probe in (*_PROBES, *tokenizer.get_vocab()):
        bare = ids_of(tokenizer, [probe])[0]
        if bare and not set(bare) & set(tokenizer.all_special_ids):
            whole = ids_of(tokenizer, [probe], specials=True)[0]
            starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
            return whole[: next(starts, 0)]
    return []
