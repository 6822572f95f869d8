"""Runs of the real command line on a tiny model, and what two of them have in common."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lit_align.__main__ import main

ROOT = Path(__file__).parents[2]


def arguments(model: str, config: str = "eps_dpo", **options: object) -> list[str]:
    """``fit`` on the pairs of the working directory, logged at each step; 2 epochs of 6 batches unless told otherwise.

    Args:
        model: Folder of the model.
        config: Name of a config that comes along.
        options: Keys of the command line with two underscores for a dot; None leaves one of the usual ones out.
    """
    chosen: dict[str, object] = {"model.pair.model": model, "data.dataset": "pairs.jsonl", "data.batch_size": 3}
    chosen |= {"data.validation_size": 4, "trainer.max_epochs": 2, "trainer.log_every_n_steps": 1}
    chosen |= {"trainer.accelerator": "cpu", "samples.prompts": 0, "run_dir": "run", "checkpoints.every_n_steps": 1}
    chosen |= {key.replace("__", "."): value for key, value in options.items()}
    config_file = str(ROOT / "configs" / f"{config}.yaml")
    return ["fit", "--config", config_file, *(f"--{k}={v}" for k, v in chosen.items() if v is not None)]


def fit(*args: object, **options: object) -> None:
    """Run ``fit`` to a good end."""
    assert main(arguments(*args, **options)) == 0  # type: ignore[arg-type]


def resume(folder: str | Path, *args: str) -> int:
    """The exit code of ``fit --resume``."""
    return main(["fit", f"--resume={folder}", *args])


def rows(folder: str | Path) -> list[dict[str, str]]:
    """``metrics.csv`` without what a clock says."""
    with (Path(folder) / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not timed(k)} for row in csv.DictReader(file)]


def timed(text: str) -> bool:
    """Whether a column or a line tells what a clock said."""
    return "second" in text or "share_of_time" in text


def outcome(folder: str | Path) -> dict[str, Any]:
    """All that must not depend on how often a run was stopped."""
    place = Path(folder)
    adapter = load_file(place / "adapter" / "adapter_model.safetensors")
    card = (place / "README.md").read_text().split("## Versions")[0].splitlines()
    samples = place / "samples.jsonl"
    return {
        "metrics": rows(folder),
        "adapter": {name: value.numpy().tobytes() for name, value in adapter.items()},
        "card": [line for line in card if not timed(line)],
        "samples": samples.read_text() if samples.exists() else "",
        "curves": json.loads((place / "curves.json").read_text()) if (place / "curves.json").exists() else None,
    }


def assert_same(found: str | Path, expected: str | Path) -> None:
    """Two runs left the same, part by part so that a failure says where."""
    one, two = outcome(found), outcome(expected)
    for part in one:
        assert one[part] == two[part], part


def variety(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """A reward that tells most completions apart: the sum of their letters' codes."""
    return [float(sum(map(ord, text))) for text in completions]
