"""Fixtures every test may use. Nothing here or in any test reaches a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # ranks are forked, which hangs where OpenMP has had threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data named by LIT_ALIGN_DATA; tests that use it are skipped where it is not set."""
    folder = os.environ.get("LIT_ALIGN_DATA")
    if not folder:
        pytest.skip("LIT_ALIGN_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept for later runs stays among the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_ALIGN_CACHE", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(autouse=True)
def own_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning leaves the port of its last process group in the environment, and another may hold it by now."""
    monkeypatch.delenv("MASTER_PORT", raising=False)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Lightning saves into the current folder where it is not told otherwise."""
    yield
    left = [name for name in ("checkpoints", "lightning_logs") if Path(name).exists()]
    for name in left:
        shutil.rmtree(name)
    assert not left, f"the test wrote {left} into the current folder"
