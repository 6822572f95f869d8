"""Files of log-probs that several processes append to, and what a killed one leaves of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_align.logp_files import HEADER, LogProbFiles


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for the work of others at once."""
    monkeypatch.setattr("lit_align.logp_files.REFRESH_SECONDS", 0.0)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def vector(number: int) -> Tensor:
    """``number`` values that say which vector they are of."""
    return torch.arange(number, dtype=torch.float32) / 7 - number


def filled(folder: Path, numbers: range) -> LogProbFiles:
    files = LogProbFiles(folder)
    files.put({key(number): vector(number) for number in numbers})
    return files


def same(found: list[Tensor] | None, numbers: list[int]) -> bool:
    return found is not None and all(torch.equal(a, vector(n)) for a, n in zip(found, numbers, strict=True))


def test_what_is_put_is_found_bit_for_bit_and_by_others(tmp_path: Path) -> None:
    first = filled(tmp_path, range(1, 6))
    assert same(first.get([key(4), key(1), key(4)]), [4, 1, 4])
    second = filled(tmp_path, range(4, 9))
    assert same(second.get([key(8), key(1)]), [8, 1])
    assert same(first.get([key(8), key(1)]), [8, 1])  # it was open before these were written
    assert first.get([key(1), key(9)]) is None
    assert len(LogProbFiles(tmp_path)) == 8


def test_a_vector_is_written_once(tmp_path: Path) -> None:
    files = filled(tmp_path, range(1, 4))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    files.put({key(number): vector(number) for number in range(1, 4)})
    filled(tmp_path, range(1, 4))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == size


def test_a_file_cut_off_anywhere_keeps_its_whole_records(tmp_path: Path) -> None:
    filled(tmp_path, range(1, 4))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    ends = [0]
    for number in (1, 2, 3):
        ends.append(ends[-1] + HEADER.size + 4 * number)
    assert ends[-1] == len(whole)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends[1:])
        files = LogProbFiles(tmp_path)
        assert len(files) == kept
        assert all(same(files.get([key(number)]), [number]) for number in range(1, kept + 1))
        assert files.get([key(kept + 1)]) is None


@pytest.mark.parametrize("tail", [b"\0" * 100, b"\xff" * 100, b"\xff" * 40, b"x"])
def test_a_tail_that_is_no_record_is_ignored_and_others_are_not(tmp_path: Path, tail: bytes) -> None:
    filled(tmp_path, range(1, 3))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + tail)
    filled(tmp_path, range(3, 5))
    assert same(LogProbFiles(tmp_path).get([key(n) for n in (1, 2, 3, 4)]), [1, 2, 3, 4])


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    filled(tmp_path, range(3, 4))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert len(LogProbFiles(tmp_path)) == 0


def test_a_record_that_is_still_being_written_is_found_when_it_is_whole(tmp_path: Path) -> None:
    filled(tmp_path, range(1, 3))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    reader = LogProbFiles(tmp_path)
    assert reader.get([key(2)]) is None
    path.write_bytes(whole)
    assert same(reader.get([key(2)]), [2])


def test_a_killed_writer_leaves_all_it_had_put(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.test_logp_files import *\n"
        "files = LogProbFiles(Path(sys.argv[1]))\n"
        "for number in range(1, 10**6):\n"
        "    files.put({key(number): vector(number)})\n"
        "    print(number, flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent, text=True) as writer:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 50:
            pass
        writer.kill()
    assert same(LogProbFiles(tmp_path).get([key(n) for n in range(1, 51)]), list(range(1, 51)))


def test_a_folder_that_is_emptied_or_cannot_be_written_only_forgets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = filled(tmp_path / "emptied", range(1, 4))
    for path in (tmp_path / "emptied").iterdir():
        path.unlink()
    assert files.get([key(1)]) is None
    files.put({key(1): vector(1)})
    assert same(LogProbFiles(tmp_path / "emptied").get([key(1)]), [1])
    (tmp_path / "file").touch()
    blocked = filled(tmp_path / "file" / "folder", range(1, 4))
    blocked.put({key(9): vector(9)})
    assert blocked.get([key(1)]) is None
    assert len([record for record in caplog.records if "takes nothing more" in record.message]) == 1
