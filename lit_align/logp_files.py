"""Vectors of log-probs by key, in files that processes only append to.

Each process that adds something writes a file of its own, so any number of them share a folder without locks, and one
that is killed leaves at most a torn record at the end of its own file, which no reader takes for a whole one.
"""

from __future__ import annotations

import logging
import struct
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

HEADER = struct.Struct("<32sII")
"""Of a record: the key, how many float32 follow, and a checksum of all that."""

REFRESH_SECONDS = 5.0
"""Least time between two looks for what other processes have added."""


class LogProbFiles:
    """Vectors of float32 by key, in a folder that any number of processes read and append to.

    Args:
        folder: Made when something is added.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._at: dict[bytes, tuple[Path, int, int]] = {}
        self._read: dict[Path, int] = {}
        self._looked = -REFRESH_SECONDS
        self._own = folder / f"{uuid.uuid4().hex}.logps"
        self._writable = True
        self.refresh()

    def __len__(self) -> int:
        return len(self._at)

    def refresh(self) -> None:
        """Find what was added since the last time."""
        self._looked = time.monotonic()
        for path in sorted(self.folder.glob("*.logps")):
            size, begin = path.stat().st_size, self._read.get(path, 0)
            if size > begin:
                with path.open("rb") as file:
                    file.seek(begin)
                    for key, place, count in _records(file, size):
                        self._at.setdefault(key, (path, place, count))
                        self._read[path] = place + 4 * count

    def get(self, keys: Sequence[bytes]) -> list[Tensor] | None:
        """The vectors of some keys, float32 (n,) each, or None unless all are there."""
        try:
            if not self._at.keys() >= set(keys) and time.monotonic() - self._looked >= REFRESH_SECONDS:
                self.refresh()
            return self._load(keys) if self._at.keys() >= set(keys) else None
        except OSError:  # somebody has emptied the folder
            self._at.clear()
            self._read.clear()
            return None

    def _load(self, keys: Sequence[bytes]) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * len(keys)
        places = [self._at[key] for key in keys]
        for path in {path for path, _, _ in places}:
            with path.open("rb") as file:
                for number, (other, place, count) in enumerate(places):
                    if other == path:
                        file.seek(place)
                        values = np.frombuffer(file.read(4 * count), "<f4").astype(np.float32)
                        if len(values) < count:
                            raise OSError(f"{path} was cut short")
                        found[number] = torch.from_numpy(values)
        return found

    def put(self, vectors: Mapping[bytes, Tensor]) -> None:
        """Add the vectors that are not there yet; where the disk refuses, say so once and add nothing more."""
        new = {key: values.numpy().astype("<f4").tobytes() for key, values in vectors.items() if key not in self._at}
        if not new or not self._writable:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._own.open("ab") as file:
                place = file.tell()
                file.write(b"".join(_header(key, values) + values for key, values in new.items()))
        except OSError as error:
            self._writable = False
            log.warning("the reference cache %s takes nothing more: %s", self.folder, error)
            return
        for key, values in new.items():
            self._at[key] = (self._own, place + HEADER.size, len(values) // 4)
            place += HEADER.size + len(values)
        self._read[self._own] = place


def _checksum(key: bytes, values: bytes) -> int:
    return zlib.crc32(values, zlib.crc32(key + struct.pack("<I", len(values) // 4)))


def _header(key: bytes, values: bytes) -> bytes:
    return HEADER.pack(key, len(values) // 4, _checksum(key, values))


def _records(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Key, place and number of the values of each record in a file of ``size`` bytes, until the first torn one."""
    while len(header := file.read(HEADER.size)) == HEADER.size:
        key, count, checksum = HEADER.unpack(header)
        place = file.tell()
        values = file.read(4 * count) if place + 4 * count <= size else b""
        if len(values) < 4 * count or _checksum(key, values) != checksum:
            return
        yield key, place, count
