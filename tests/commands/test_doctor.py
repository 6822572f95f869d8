"""``doctor``: what it says of a run before it starts, from the options of ``fit``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from rich.text import Text

from lit_align.__main__ import main
from lit_align.commands import doctor
from lit_align.commands.doctor import END, PROMPT, TRAINED, about_package, row_lines
from lit_align.data.collate import Group, collate
from tests.commands.conftest import ROOT
from tests.data.conftest import byte_tokenizer, pair_rows, write_jsonl


def styled(line: Text) -> dict[str, str]:
    """The text of each style."""
    return {str(span.style): line.plain[span.start : span.end] for span in line.spans}


def test_each_token_is_shown_as_what_it_is() -> None:
    tokenizer = byte_tokenizer()
    prompt, whole, cut = (torch.tensor(tokenizer(text).input_ids, dtype=torch.int32) for text in ("Ask", " yes", " no"))
    end = torch.tensor([tokenizer.eos_token_id], dtype=torch.int32)
    batch = collate([Group(7, prompt, [torch.cat([whole, end]), cut], [1.0, 0.0])])
    asked, first, second = row_lines(batch, 0, tokenizer)
    assert styled(asked)[PROMPT] == "Ask"
    assert (styled(first)[TRAINED], styled(first)[END]) == (" yes", "</s>")
    assert END not in styled(second)
    assert second.plain.endswith(" no|cut")
    assert "row 7" in asked.plain
    assert "5 tokens trained, reward +1" in first.plain


def test_a_package_below_its_floor_is_marked() -> None:
    assert "DOES NOT FIT" in about_package(Requirement("torch>=999"))
    assert "DOES NOT FIT" not in about_package(Requirement("torch>=1"))
    assert "IS MISSING" in about_package(Requirement("no-such-package-here>=1"))


def examined(base: str, *options: str) -> list[str]:
    write_jsonl(Path("pairs.jsonl"), pair_rows(24))
    config = str(ROOT / "configs/dpo.yaml")
    return ["doctor", "--config", config, "--model.pair.model", base, "--data.dataset", "pairs.jsonl", *options]


def test_it_reports_and_leaves_nothing_behind(base: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(examined(base, "--rows", "1", "--load_weights", "true")) == 0
    out = capsys.readouterr().out
    for words in (
        "torch ",
        "no chat template",
        "with the adapter off",
        "validation",
        "DPO can learn",
        "memory: a peak of",
        "agree exactly",
    ):
        assert words in out
    assert [path.name for path in place.iterdir()] == ["pairs.jsonl"]


def test_it_loads_no_weights_unless_asked(base: str, place: Path) -> None:
    Path(base, "model.safetensors").rename("away")
    try:
        assert main(examined(base)) == 0
    finally:
        Path("away").rename(Path(base, "model.safetensors"))


def test_it_looks_at_the_weights_beside_samples_of_the_policy_too(
    base: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "SPO", "--data", "MixedData", "--data.dataset", "pairs.jsonl", "--load_weights", "true"]
    assert main([*examined(base), *options]) == 0
    assert "agree exactly" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "EXORw"], ["EXORw", "reward"]),
        (["--model", "SFT"], ["SFT", "Demonstrations"]),
        (["--model", "REINFORCE", "--model.kl_coef", "0.1", "--data", "ScoredGroups"], ["kl_coef is 0.1", "dataset"]),
        (["--data.max_lenght", "3"], ["did you mean data.max_length?"]),
        (["--row", "3"], ["did you mean rows?"]),
        (["--rows", "-1"], ["rows is -1"]),
    ],
)
def test_it_refuses_what_fit_refuses(
    base: str, place: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert main(examined(base, *options)) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_the_help_of_a_light_subcommand_imports_no_heavy_library() -> None:
    """Comparing runs needs their files only."""
    code = (
        "import sys; from lit_align.__main__ import main\ntry: main(['compare', '--help'])\nexcept SystemExit: pass\n"
    )
    code += "print([name for name in ('lightning', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("accelerator", "devices", "share"),
    [
        ("cpu", "1", 2),
        ("auto", "3", 6),
        ("gpu", "[0,2]", 4),
        ("auto", "0,1,3", 6),
        ("auto", "-1", 8),
        ("cpu", "auto", 2),
    ],
)
def test_the_memory_is_planned_for_the_devices_of_the_run(
    base: str, place: Path, monkeypatch: pytest.MonkeyPatch, accelerator: str, devices: str, share: int
) -> None:
    """On a machine that has a GPU, of which nothing is used here."""
    seen: list[object] = []
    monkeypatch.setattr(doctor, "plan", lambda settings, data, device, share, moving: seen.append((device.type, share)))
    monkeypatch.setattr(doctor, "environment", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    given = [f"--trainer.accelerator={accelerator}", f"--trainer.devices={devices}"]
    assert main(examined(base, *given, "--trainer.accumulate_grad_batches=2")) == 0
    assert seen == [("cpu" if accelerator == "cpu" else "cuda", share)]
