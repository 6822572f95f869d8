"""Nested state in one file: it comes back as it was, or not at all."""

from __future__ import annotations

import errno
import math
import os
import pickle
import random
import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lit_align.statefile import BadState, pack, read_state, unpack, write_state

TENSORS = [
    torch.randn(3, 4),
    torch.randn(3, 4).t(),
    torch.randn(6)[::2],
    torch.tensor(2.5, dtype=torch.float64),
    torch.empty(0, 3),
    torch.randn(5).bfloat16(),
    torch.tensor([True, False]),
    torch.tensor([math.nan, math.inf, -0.0]),
    torch.randint(0, 255, (7,), dtype=torch.uint8),
    torch.tensor([2**62, -1]),
    torch.nn.Parameter(torch.ones(2)),
]
PLAIN: list[Any] = [
    None,
    True,
    0,
    -(2**80),
    0.1 + 0.2,
    5e-324,
    math.inf,
    -math.inf,
    "",
    'quotes " and \\ and "sha256":"',
    "β, \ud800, \x00",
    b"\x00\xff",
    [],
    {},
    (),
    [[], ({},), {"": None}],
    {1: "int", "1": "str", None: 0, (1, "a"): 2.0, True and 7: 1, 2.5: [3]},
    {"tensor": "0", "dict": {"items": []}},
    random.Random(3).getstate(),
]


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and pack(a.contiguous()) == pack(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a == b or a != a


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:30])
def test_plain_values_come_back_with_their_types(value: Any) -> None:
    assert same(value, unpack(bytes(pack(value))))


@pytest.mark.parametrize("index", range(len(TENSORS)))
def test_tensors_come_back_bit_for_bit(index: int) -> None:
    found = unpack(bytes(pack({"deep": [{"t": TENSORS[index]}]})))["deep"][0]["t"]
    assert found.dtype == TENSORS[index].dtype
    assert torch.equal(found.nan_to_num(7), TENSORS[index].detach().nan_to_num(7))
    assert torch.equal(found.isnan(), TENSORS[index].isnan())


@pytest.mark.parametrize(
    "value", [np.float32(0.1), np.int64(-3), np.bool_(True), np.arange(6, dtype=np.uint32).reshape(2, 3), np.zeros(0)]
)
def test_numpy_values_come_back_with_their_types(value: Any) -> None:
    assert same(value, unpack(bytes(pack([value])))[0])


def test_tensors_that_share_memory_come_back_each_with_its_own() -> None:
    whole = torch.arange(6.0)
    found = unpack(bytes(pack({"whole": whole, "part": whole[2:4], "again": whole})))
    found["whole"] += 1
    assert found["part"].tolist() == [2, 3]
    assert found["again"].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_state_of_an_optimizer_and_its_schedule_go_on_exactly(tmp_path: Path) -> None:
    def build() -> tuple[Any, Any, Any]:
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        return weight, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def go(weight: Any, optimizer: Any, schedule: Any, steps: int) -> None:
        for _ in range(steps):
            weight.grad = weight.detach() ** 2 - 0.3
            optimizer.step()
            schedule.step()

    whole, halves = build(), build()
    go(*whole, 6)
    go(*halves, 3)
    write_state(tmp_path / "s", {"w": halves[0], "o": halves[1].state_dict(), "s": halves[2].state_dict()})
    state, resumed = read_state(tmp_path / "s"), build()
    resumed[0].data.copy_(state["w"])
    resumed[1].load_state_dict(state["o"])
    resumed[2].load_state_dict(state["s"])
    go(*resumed, 3)
    assert torch.equal(resumed[0], whole[0])


@pytest.mark.parametrize("value", [{1, 2}, object(), print, torch.eye(2).to_sparse()])
def test_what_cannot_be_kept_is_named_with_its_place(value: Any) -> None:
    with pytest.raises(TypeError, match=r"state.callbacks\[1\] is a|layout"):
        pack({"callbacks": [0, value]})


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    write_state(tmp_path / "s", {"a": torch.ones(2)})
    with safe_open(tmp_path / "s", "pt") as file:
        assert file.get_tensor("0").tolist() == [1, 1]


def test_every_changed_byte_is_noticed() -> None:
    """Each byte of the file once, changed to a random other value, and each length cut short."""
    data = bytes(pack({"w": torch.arange(3.0), "step": 12, "text": 'a "sha256":"b'}))
    generator = random.Random(0)
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= generator.randrange(1, 256)
        with pytest.raises(BadState):
            unpack(bytes(broken))
        with pytest.raises(BadState):
            unpack(data[:at])
    with pytest.raises(BadState):
        unpack(data + b"\x00")
    assert unpack(data)["step"] == 12


class Trap:
    """A pickle of it would run code."""

    def __reduce__(self) -> Any:
        return os.system, ("touch trapped",)


def test_pickles_are_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "trap": Trap()}, "zip.ckpt")
    Path("plain.ckpt").write_bytes(pickle.dumps(Trap()))
    for name in ("zip.ckpt", "plain.ckpt"):
        with pytest.raises(BadState, match="pickle"):
            read_state(Path(name))
    assert not Path("trapped").exists()


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit of 64 KiB on every file, as a full disk would set it; the system sends a signal that is ignored."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_takes_no_more_leaves_the_old_file(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "s"
    write_state(path, {"step": 1})
    with pytest.raises(OSError) as caught:
        write_state(path, {"step": 2, "w": torch.zeros(1 << 16)})
    assert caught.value.errno == errno.EFBIG
    assert read_state(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_a_file_system_that_cannot_flush_a_folder_still_keeps_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def refusing(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(handle)

    monkeypatch.setattr(os, "fsync", refusing)
    write_state(tmp_path / "a.ckpt", {"n": 1})
    assert read_state(tmp_path / "a.ckpt") == {"n": 1}
