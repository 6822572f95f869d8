"""Processes of a run of several ranks that outlive the one that started them."""

from __future__ import annotations

import os
import threading
import time

EVERY = 5.0
"""Seconds between two looks."""


def end_with_parent() -> None:
    """End this process soon after the one that started it, if it is one of several ranks on a machine.

    A rank whose peer has died waits in a collective operation, on GPUs for as long as the process group's time limit.
    The launcher ends the others when a rank dies; when the launcher itself dies, nobody would.
    """
    if "LOCAL_RANK" in os.environ and os.name == "posix":
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="parent-watch").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY)
    os._exit(1)  # the main thread may hang where no exception reaches it
