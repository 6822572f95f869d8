"""A run to use, made once by the real command line: a tiny model that reads and writes bytes, trained hard."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lit_align.__main__ import main
from tests.data.conftest import byte_tokenizer, pair_rows, write_jsonl
from tests.families import save_tiny

ROOT = Path(__file__).parents[2]


def letters(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Characters of the completion."""
    return [float(len(text)) for text in completions]


def picky(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Fails on some prompts."""
    if any(prompt.endswith("1") for prompt in prompts):
        raise RuntimeError("no prompt may end in 1")
    return letters(prompts, completions)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights whose tokenizer has one token for each byte."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer()
    save_tiny("llama", folder, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)
    return str(folder)


def fit(base: str, folder: Path, config: str = "dpo", **options: object) -> Path:
    """Train three steps in ``folder``, which then holds the rows and the folder of the run."""
    rows = write_jsonl(folder / "pairs.jsonl", pair_rows(24))
    chosen: dict[str, object] = {"model.pair.model": base, "data.dataset": rows, "data.batch_size": 8}
    chosen |= {
        "data.validation_size": 8,
        "trainer.max_steps": 3,
        "trainer.log_every_n_steps": 1,
        "run_dir": folder / "run",
    }
    chosen |= {
        "trainer.accelerator": "cpu",
        "samples.prompts": 2,
        "samples.max_new_tokens": 8,
        "samples.every_n_steps": 1,
    }
    chosen |= {"model.optim.learning_rate": 0.05, **{key.replace("__", "."): value for key, value in options.items()}}
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert (
            main(["fit", "--config", str(ROOT / f"configs/{config}.yaml"), *(f"--{k}={v}" for k, v in chosen.items())])
            == 0
        )
    finally:
        signal.signal(signal.SIGINT, handler)
    return folder / "run"


@pytest.fixture(scope="session")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of DPO; do not write into it."""
    return fit(base, tmp_path_factory.mktemp("dpo"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty working directory."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)
