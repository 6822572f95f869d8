"""One file for nested state: tensors as safetensors, all else as JSON in its header, and a hash over every byte.

Any safetensors reader opens it. Nothing in it is ever executed. The state may hold None, booleans, numbers (numpy's
too, and infinities), strings, bytes, tensors, numpy arrays, and lists, tuples and dicts of these, with keys of any of
the plain kinds; it comes back equal, of the same types.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

FORMAT = "lit_align state 1"
DIGEST = b'"sha256":"'
"""What stands in the header before the hash; inside other header strings its quotes are escaped."""
BLANK = b"0" * 64
PART = ".part"
"""Ending of a file that is still being written; what ends so can be deleted."""


class BadState(ValueError):
    """A file that is no state of ours, or no longer; the message says what is wrong with it, without its name."""


def write_state(path: Path, state: Any) -> None:
    """Write beside the final name, flush to the disk, and move into place in one step.

    Whoever looks at ``path`` sees the old file or the new one, whole. Both are on one file system.

    Args:
        path: The file; its folder is made.
        state: What to keep.

    Raises:
        OSError: If the disk is full or refuses; ``path`` is as it was and nothing else is left.
        TypeError: If the state holds what cannot be kept, with its place.
    """
    data = memoryview(pack(state))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}{PART}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's own list of files, so that a move outlasts a power cut; not all file systems can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                os.fsync(handle)
        finally:
            os.close(handle)


def read_state(path: Path) -> Any:
    """What ``write_state`` wrote, tensors on the CPU.

    Raises:
        BadState: If the file is a pickle, is not ours, or a single byte of it has changed.
        OSError: If it cannot be read.
    """
    return unpack(path.read_bytes())


def pack(state: Any) -> bytearray:
    """The bytes of a file that holds the state."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_described(state, tensors, "state"), separators=(",", ":"))
    data = bytearray(save(tensors, {"format": FORMAT, "sha256": BLANK.decode(), "state": text}))
    at = _digest_place(data)
    data[at : at + len(BLANK)] = hashlib.sha256(data).hexdigest().encode()
    return data


def unpack(data: bytes) -> Any:
    """The state that the bytes of a file hold.

    Raises:
        BadState: If it is a pickle, is not ours, or a single byte has changed.
    """
    at = _digest_place(data)
    found = hashlib.sha256(data[:at])
    found.update(BLANK)
    found.update(memoryview(data)[at + len(BLANK) :])
    if found.hexdigest().encode() != data[at : at + len(BLANK)]:
        raise BadState("its bytes do not have the hash that it was written with: it is damaged or cut short")
    size = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + size])["__metadata__"]
    if about["format"] != FORMAT:
        raise BadState(f"it is of the format {about['format']!r}, and this version reads {FORMAT!r}")
    return _restored(json.loads(about["state"]), load(bytes(data)))


def _digest_place(data: bytes | bytearray) -> int:
    """Where the hash stands, in a file that looks like ours."""
    size = int.from_bytes(data[:8], "little")
    at = data.find(DIGEST, 8, 8 + size) if 8 < size <= len(data) else -1
    if at >= 0 and at + len(DIGEST) + len(BLANK) < 8 + size:
        return at + len(DIGEST)
    if data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and data[-1:] == b"."):
        raise BadState("it is a pickle, which can run code when it is read, and is refused")
    raise BadState("its header is damaged, cut short, or not of this program")


def _described(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """The value as JSON; what JSON lacks is an object with one key that names its kind."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return {"numpy": [value.dtype.str, value.tobytes().hex()]}
    if isinstance(value, int | str):
        return int(value) if isinstance(value, int) else str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = _own_memory(value)
        return {"tensor": name}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {"array": [value.dtype.str, list(value.shape), value.tobytes().hex()]}
    if isinstance(value, list | tuple):
        found = [_described(one, tensors, f"{place}[{i}]") for i, one in enumerate(value)]
        return found if isinstance(value, list) else {"tuple": found}
    if isinstance(value, dict):
        return _described_dict(value, tensors, place)
    raise TypeError(
        f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold: "
        "give it as tensors, numbers, strings, lists, tuples and dicts"
    )


def _described_dict(value: dict[Any, Any], tensors: dict[str, Tensor], place: str) -> Any:
    if all(type(key) is str for key in value):
        return {"dict": {key: _described(one, tensors, f"{place}.{key}") for key, one in value.items()}}
    pairs = [
        [_described(key, tensors, f"a key of {place}"), _described(one, tensors, f"{place}[{key!r}]")]
        for key, one in value.items()
    ]
    return {"items": pairs}


def _own_memory(value: Tensor) -> Tensor:
    """A dense copy on the CPU that shares memory with no other tensor that is written."""
    if value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"a tensor of layout {value.layout} cannot be kept: make it dense")
    kept = value.detach().cpu().contiguous()
    return kept.clone() if kept.data_ptr() == value.data_ptr() else kept


def _restored(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "dict":
        return {key: _restored(one, tensors) for key, one in held.items()}
    if kind == "items":
        return {_restored(key, tensors): _restored(one, tensors) for key, one in held}
    if kind == "tuple":
        return tuple(_restored(one, tensors) for one in held)
    if kind == "tensor":
        return tensors[held]
    if kind == "float":
        return float(held)
    if kind == "bytes":
        return bytes.fromhex(held)
    if kind == "numpy":
        return np.frombuffer(bytes.fromhex(held[1]), held[0])[0]
    if kind == "array":
        return np.frombuffer(bytes.fromhex(held[2]), held[0]).reshape(held[1]).copy()
    raise BadState(f"it holds a value of the unknown kind {kind!r}")
