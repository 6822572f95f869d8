"""A tiny model, a working directory with pairs, and curves as numbers instead of a picture."""

from __future__ import annotations

import json
import shutil
import signal
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lit_align.callbacks import checkpoints, curves


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama that reads and writes characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {token: i for i, token in enumerate(["</s>", "<unk>", *sorted(string.printable)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), eos_token_id=0, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with twenty rows; curves are written as JSON; signals are put back afterwards."""
    monkeypatch.chdir(tmp_path)

    def points(found: object, path: Path) -> None:
        path.with_suffix(".json").write_text(json.dumps(found))

    monkeypatch.setattr(curves, "draw_curves", points)
    written = [" good", " so so", " bad", " worse"]
    lines = [
        {
            "prompt": f"Story {i}:",
            "completions": [" very" * (i % 3) + t for t in written],
            "rewards": [1, 0.2, -0.3, -1],
        }
        for i in range(20)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def moments(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the run folder ``run`` as it was right after each checkpoint, named 1, 2 and so on."""
    kept = place / "moments"
    kept.mkdir()
    real = checkpoints.advance

    def advance(fresh: Path, folder: Path, keep_previous: bool) -> None:
        real(fresh, folder, keep_previous)
        if folder.parent.name == "run":
            shutil.copytree("run", kept / str(len(list(kept.iterdir())) + 1))

    monkeypatch.setattr(checkpoints, "advance", advance)
    return kept
