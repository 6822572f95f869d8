"""Every YAML that ships trains, by the command a user types."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from lit_align.__main__ import main

ROOT = Path(__file__).parent.parent
OBJECTIVES = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = ["--data.max_rows=40", "--data.batch_size=4", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
SMALL += ["--trainer.limit_val_batches=1", "--samples.prompts=2", "--samples.max_new_tokens=8"]


def fit(*args: str) -> None:
    """Run the command in this process; it must end as a successful command does."""
    try:
        code = main(["fit", *args])
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    assert code in (None, 0)


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda path: path.stem)
def test_it_trains_two_steps(config: Path, tmp_path: Path) -> None:
    fit("--config", str(config), *SMALL, "--run_dir", str(tmp_path / "run"))
    rows = [row for row in metrics(tmp_path / "run") if row.get("train/loss")]
    assert len(rows) == 2
    assert all(math.isfinite(float(row["train/loss"])) for row in rows)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("overlay", sorted((ROOT / "configs" / "hardware").glob("*.yaml")), ids=lambda path: path.stem)
def test_it_trains_under_each_hardware_overlay(overlay: Path, tmp_path: Path) -> None:
    here = ["--trainer.accelerator=cpu", "--model.pair.dtype=float32", "--trainer.accumulate_grad_batches=1"]
    configs = ["--config", str(ROOT / "configs" / "eps_dpo.yaml"), "--config", str(overlay)]
    fit(*configs, *here, *SMALL, "--run_dir", str(tmp_path / "run"))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_config_is_short() -> None:
    """A new objective is one file of at most 25 lines."""
    for path in OBJECTIVES:
        assert len(path.read_text().splitlines()) <= 25
