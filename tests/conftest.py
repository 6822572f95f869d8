"""Fixtures every test may use. Nothing here or in any test reaches a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data named by LIT_ALIGN_DATA; tests that use it are skipped where it is not set."""
    folder = os.environ.get("LIT_ALIGN_DATA")
    if not folder:
        pytest.skip("LIT_ALIGN_DATA is not set")
    return Path(folder)


@pytest.fixture(autouse=True)
def own_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning leaves the port of its last process group in the environment, and another may hold it by now."""
    monkeypatch.delenv("MASTER_PORT", raising=False)
