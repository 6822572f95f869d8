"""What the C library's heap grows to under a sequence of allocations.

PyTorch takes the memory of tensors on a CPU from the C library. Holes that freed tensors leave are not always taken by
the next ones, so a process can hold twice what its tensors need, and more. The same requests, made without touching the
memory, tell the least it will be: small objects that settle in the holes make more of them, and those are not asked
for here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

ALIGNMENT = 64
"""As PyTorch asks for."""


class _Info(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def growth(events: Iterable[tuple[int, int]]) -> int | None:
    """Most bytes the heap takes from the system beyond what it holds now.

    Args:
        events: (number, size) for a request of that many bytes, (number, 0) when what it got is given back.

    Returns:
        Bytes, or None where the C library gives no account of its heap.
    """
    library: Any = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return None
    library.mallinfo2.restype = _Info
    library.free.argtypes = [ctypes.c_void_p]
    library.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    before, most = _held(library), 0
    places: dict[int, ctypes.c_void_p] = {}
    for number, size in events:
        if size:
            place = places[number] = ctypes.c_void_p()
            if library.posix_memalign(ctypes.byref(place), ALIGNMENT, size):
                most = -1  # more than there are addresses for
                break
            most = max(most, _held(library) - before)
        elif number in places:
            library.free(places.pop(number))
    for place in places.values():
        library.free(place)
    return None if most < 0 else most


def _held(library: Any) -> int:
    info = library.mallinfo2()
    return int(info.arena + info.hblkhd)
