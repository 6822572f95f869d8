from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lit_align.data.rows import DataError, SplitMissing, raise_bad_rows
from lit_align.data.sources import is_single_file, read_rows
from tests.data.conftest import pair_rows, write_jsonl

ROWS = pair_rows(5)


def fields(source) -> list[dict]:
    return [row.fields for row in source.rows]


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_json_lines_plain_and_compressed_give_the_rows_and_their_lines(tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl", ROWS)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        source = read_rows(str(path), "any")
        assert fields(source) == ROWS
        assert [row.place for row in source.rows] == [f"{path.name}:{line}" for line in (1, 2, 3, 4, 5)]
        assert [row.number for row in source.rows] == [0, 1, 2, 3, 4]


def test_blank_lines_and_a_byte_order_mark_are_no_rows_but_lines_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}')
    source = read_rows(str(path), "train")
    assert [(row.place, row.fields) for row in source.rows] == [
        ("a.jsonl:1", {"prompt": "a"}),
        ("a.jsonl:4", {"prompt": "b"}),
    ]
    assert source.problems == []


def test_a_json_list_and_parquet_give_the_same_rows(tmp_path):
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps(ROWS))
    table = write_parquet(tmp_path / "b.parquet", ROWS)
    for path in (listed, table):
        source = read_rows(str(path), "train")
        assert fields(source) == ROWS
        assert source.rows[3].place == f"{path.name}[3]"


def test_parquet_keeps_messages_as_lists_of_objects(tmp_path):
    rows = [{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert fields(read_rows(str(write_parquet(tmp_path / "a.parquet", rows)), "train")) == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_max_rows_stops_early(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, ROWS)
    elif name == "a.json":
        path.write_text(json.dumps(ROWS))
    else:
        write_jsonl(path, ROWS)
    assert fields(read_rows(str(path), "train", max_rows=2)) == ROWS[:2]


def test_each_bad_line_is_named_in_one_pass(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'{"prompt": "a"}', b'{"prompt": }', b'["x"]', b'{"a": "\xff"}', b'{"prompt": "b"}']
    path.write_bytes(b"\n".join(lines))
    source = read_rows(str(path), "train")
    assert [row.number for row in source.rows] == [0, 4]
    assert len(source.problems) == 3
    assert source.problems[0] == "a.jsonl:2: not valid JSON at column 12: Expecting value"
    assert source.problems[1].startswith("a.jsonl:3: a row must be an object")
    assert source.problems[1].endswith("not a list")
    # The byte is the 8th of its line; 15 + 12 + 5 bytes and three line breaks come before the line.
    assert source.problems[2].startswith("a.jsonl:4: not UTF-8 at byte 8 of the line, byte 43 of the file (0xff)")
    assert "save the file as UTF-8" in source.problems[2]


def test_twenty_bad_rows_are_shown_and_the_rest_counted():
    with pytest.raises(DataError) as error:
        raise_bad_rows("a.jsonl", [f"a.jsonl:{line}: wrong" for line in range(1, 24)], 30)
    message = str(error.value)
    assert "23 bad rows of 30" in message
    assert "a.jsonl:20: wrong" in message
    assert "a.jsonl:21" not in message
    assert "and 3 more" in message
    raise_bad_rows("a.jsonl", [], 30)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'{"prompt": "a"}', ["must hold a list of objects", "an object"]),
        ("a.json", b'{"a": 1}\n{"a": 2}', [":2:", "name the file .jsonl"]),
        ("a.json", b'[{"a": "\n\xfe"}]', [":2:", "byte 10 of the file", "UTF-8"]),
        ("a.jsonl.gz", b"not gzip", ["damaged", "download it again"]),
        ("a.parquet", b"not parquet", ["not a readable Parquet file"]),
        ("a.csv", b"a,b", ["cannot read this kind of file", ".jsonl", ".parquet"]),
    ],
)
def test_a_file_unreadable_as_a_whole_says_why(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(str(path), "train")
    assert str(path) in str(error.value)
    for part in expected:
        assert part in str(error.value)


def test_a_truncated_gzip_is_reported(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode() * 50)[:-9])
    with pytest.raises(DataError, match="damaged"):
        read_rows(str(path), "train")


def test_a_missing_file_names_the_nearest_one(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError) as error:
        read_rows(str(tmp_path / "trian.jsonl"), "train")
    assert str(tmp_path / "trian.jsonl") in str(error.value)
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in str(error.value)


def test_a_missing_folder_names_the_last_part_that_exists(tmp_path):
    with pytest.raises(DataError) as error:
        read_rows(str(tmp_path / "no" / "such" / "train.jsonl"), "train")
    assert f"there is no folder {tmp_path / 'no' / 'such'}" in str(error.value)
    assert f"{tmp_path} is the last part that exists" in str(error.value)


def test_a_folder_is_read_by_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "validation.jsonl", ROWS[3:])
    (tmp_path / "notes.txt").write_text("not data")
    assert fields(read_rows(str(tmp_path), "train")) == ROWS[:3]
    assert fields(read_rows(str(tmp_path), "validation")) == ROWS[3:]
    with pytest.raises(SplitMissing, match='no split "test"; found: train, validation'):
        read_rows(str(tmp_path), "test")
    assert not is_single_file(str(tmp_path))
    assert is_single_file(str(tmp_path / "train.jsonl"))


def test_shards_of_a_split_are_joined_under_one_numbering(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:2])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[2:])
    source = read_rows(str(tmp_path), "train")
    assert fields(source) == ROWS
    assert [row.number for row in source.rows] == [0, 1, 2, 3, 4]
    assert source.rows[2].place == "train-00001-of-00002.parquet[0]"
    assert fields(read_rows(str(tmp_path), "train", max_rows=3)) == ROWS[:3]


def test_shards_that_are_missing_are_named(tmp_path):
    for number in (0, 1, 3):
        write_jsonl(tmp_path / f"train-{number:05}-of-00005.jsonl", ROWS[:1])
    with pytest.raises(DataError, match=r"of the 5 shards of the split \"train\" these are missing: 2, 4;"):
        read_rows(str(tmp_path), "train")
    assert fields(read_rows(str(tmp_path / "train-00003-of-00005.jsonl"), "train")) == ROWS[:1]
    for number in (1, 2):
        write_jsonl(tmp_path / f"test-{number}-of-2.jsonl", ROWS[:number])
    assert len(fields(read_rows(str(tmp_path), "test"))) == 3  # counted from 1
    write_jsonl(tmp_path / "test-00000-of-00001.jsonl", ROWS)
    with pytest.raises(DataError, match='shards of more than one kind for the split "test"'):
        read_rows(str(tmp_path), "test")


def test_two_files_of_one_split_are_refused(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_parquet(tmp_path / "train.parquet", ROWS)
    with pytest.raises(DataError, match=r'several files for the split "train": train.jsonl, train.parquet; keep one'):
        read_rows(str(tmp_path), "train")


def test_what_datasets_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([4])}).save_to_disk(tmp_path / "two")
    assert fields(read_rows(str(tmp_path / "one"), "train")) == ROWS
    assert fields(read_rows(str(tmp_path / "two"), "test")) == ROWS[4:]
    with pytest.raises(SplitMissing, match="found: test, train"):
        read_rows(str(tmp_path / "two"), "validation")


def test_a_hub_name_goes_through_datasets_with_its_configuration(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, name=None, split=None):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = read_rows("owner/pairs:small", "train", max_rows=2)
    assert asked == [("owner/pairs", "small", "train")]
    assert fields(source) == ROWS[:2]
    assert source.rows[1].place == "owner/pairs:small/train[1]"
    read_rows("pairs", "test")
    assert asked[1] == ("pairs", None, "test")


def test_a_hub_failure_says_it_is_neither_local_nor_reachable(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")

    def load_dataset(path, name=None, split=None):
        raise ConnectionError("no route to the host\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        read_rows("owner/pairs", "train")
    message = str(error.value)
    assert '"owner/pairs": there is no such file or folder in ' + str(tmp_path) in message
    assert "could not be loaded from the Hugging Face Hub (ConnectionError: no route to the host)" in message
    assert "give a local .jsonl or .parquet file" in message


def test_a_hub_dataset_of_several_configs_says_which(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(path, name=None, split=None):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"available configs: \['a', 'b'\] Give it as data.dataset owner/pairs:CONFIG"):
        read_rows("owner/pairs", "train")


def test_an_unknown_split_on_the_hub_is_told_apart(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(path, name=None, split=None):
        raise ValueError(f"Unknown split \"{split}\". Should be one of ['train'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SplitMissing, match="Should be one of"):
        read_rows("owner/pairs", "validation")
