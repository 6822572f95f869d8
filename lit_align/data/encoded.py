"""Token ids of many texts, kept on disk for the next run that reads the same texts with the same tokenizer."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lit_align.caches import root
from lit_align.specials import ids_of
from lit_align.statefile import BadState, read_state, write_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

WORTH_KEEPING = 5_000_000
"""Characters from which ids are kept: a second or two of a fast tokenizer on one core."""

Encode = Callable[["PreTrainedTokenizerBase", Sequence[str]], list[list[int]]]
"""From texts to their token ids, without special tokens."""


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts without special tokens: from disk if they are there, else computed, and kept if many.

    What is kept is found by a hash of all texts and of all that the tokenizer does to them, so nothing can be out of
    date. Files of other texts stay until somebody deletes them.

    Args:
        tokenizer: The policy's. Only of a fast one is it known what it does; ids of any other are not kept.
        texts: May be empty.
    """
    from transformers import __version__

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or sum(map(len, texts)) < WORTH_KEEPING:
        return ids_of(tokenizer, texts)
    split = str(getattr(tokenizer, "split_special_tokens", False))
    path = root() / "tokens" / f"{_key([__version__, split, backend.to_str()], texts)}.safetensors"
    known = _read(path, len(texts))
    if known is not None:
        return known
    found = ids_of(tokenizer, texts)
    _keep(path, found)
    return found


def _key(tokenizer: Sequence[str], texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in (*tokenizer, *texts):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<Q", len(data)))
        digest.update(data)
    return digest.hexdigest()


def _read(path: Path, count: int) -> list[list[int]] | None:
    try:
        state = read_state(path)
        ids, lengths = state["ids"].tolist(), state["lengths"].tolist()
    except FileNotFoundError:
        return None
    except (OSError, BadState, KeyError) as error:
        log.warning("%s is damaged (%s): the texts are tokenized again", path, error)
        return None
    if len(lengths) != count:
        return None
    return [ids[begin:end] for begin, end in pairwise(accumulate(lengths, initial=0))]


def _keep(path: Path, found: list[list[int]]) -> None:
    ids = torch.tensor([token for one in found for token in one], dtype=torch.int32)
    try:
        write_state(path, {"ids": ids, "lengths": torch.tensor([len(one) for one in found], dtype=torch.int32)})
    except OSError as error:
        log.info("token ids are not kept: %s", error)
