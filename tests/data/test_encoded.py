"""Token ids that are kept on disk are those of the tokenizer, and of no other texts or tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lit_align.data import PreferenceData, encoded
from lit_align.data.encoded import encode
from lit_align.specials import ids_of
from tests.data.conftest import byte_tokenizer, pair_rows, write_jsonl

TEXTS = ["one two", "", "d\u00e9j\u00e0 vu", "two\n\nlines", "one two"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(encoded, "WORTH_KEEPING", 10)
    return tmp_path / "tokens"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts that were really tokenized."""
    seen: list[list[str]] = []

    def counted(tokenizer: Any, texts: Any) -> list[list[int]]:
        seen.append(list(texts))
        return ids_of(tokenizer, texts)

    monkeypatch.setattr(encoded, "ids_of", counted)
    return seen


def test_a_second_run_tokenizes_nothing(folder: Path, asked: list[list[str]]) -> None:
    first = encode(byte_tokenizer(), TEXTS)
    second = encode(byte_tokenizer(), TEXTS)
    assert len(asked) == 1
    assert first == second == ids_of(byte_tokenizer(), TEXTS)
    assert [len(ids) for ids in first] == [len(text.encode()) for text in TEXTS]


def test_other_texts_and_another_tokenizer_never_hit(folder: Path, asked: list[list[str]]) -> None:
    encode(byte_tokenizer(), TEXTS)
    swapped = [TEXTS[2], *TEXTS[1:2], TEXTS[0], *TEXTS[3:]]
    joined = [TEXTS[0] + TEXTS[2], "", *TEXTS[3:]]
    for texts in (swapped, joined, TEXTS[:4], [*TEXTS, ""]):
        assert encode(byte_tokenizer(), texts) == ids_of(byte_tokenizer(), texts)
    other = byte_tokenizer()
    other.add_tokens(["two"])
    found = encode(other, TEXTS)
    assert found == ids_of(other, TEXTS) != encode(byte_tokenizer(), TEXTS)
    assert len(asked) == 6
    assert len(list(folder.iterdir())) == 6


def test_few_texts_leave_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "WORTH_KEEPING", sum(map(len, TEXTS)) + 1)
    encode(byte_tokenizer(), TEXTS)
    assert not folder.exists()


@pytest.mark.parametrize("place", [0, 60, -1])
def test_a_damaged_file_is_named_and_replaced(
    place: int, folder: Path, asked: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    good = encode(byte_tokenizer(), TEXTS)
    (path,) = folder.iterdir()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert encode(byte_tokenizer(), TEXTS) == good
    assert str(path) in caplog.text
    assert encode(byte_tokenizer(), TEXTS) == good
    assert len(asked) == 2


def test_a_folder_that_cannot_be_written_is_no_obstacle(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    assert encode(byte_tokenizer(), TEXTS) == ids_of(byte_tokenizer(), TEXTS)


def test_data_that_is_read_twice_is_tokenized_once(folder: Path, asked: list[list[str]], tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "rows.jsonl", pair_rows(12)))
    groups = []
    for _ in range(2):
        data = PreferenceData(source, validation_size=0)
        data.load(byte_tokenizer())
        groups.append([(g.prompt_ids.tolist(), [c.tolist() for c in g.completion_ids]) for g in data._train])
    assert groups[0] == groups[1]
    assert len(asked) == 2  # prompts and completions
