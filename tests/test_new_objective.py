"""A new objective is one file, one YAML and one test, and nothing else is edited: done here in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_align.__main__ import main

ROOT = Path(__file__).parent.parent

OBJECTIVE = '''
import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def hinge_loss(logratio: Tensor, beta: float) -> Tensor:
    """L = max(0, 1 - beta m)."""
    return (1 - beta * (logratio[:, 0] - logratio[:, 1])).clamp(min=0)


class Hinge(AlignModule):
    """A hinge on the implicit reward."""

    def __init__(self, beta: float = 0.1, pair: PairSettings = PairSettings(), optim: OptimSettings = OptimSettings()):
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "0.1")
        self.beta = beta

    def loss(self, batch: CompletionBatch) -> Loss:
        logratio = self.score(batch).logratio
        value = hinge_loss(logratio, self.beta)
        return Loss(value, torch.ones_like(value), self.beta * logratio.detach(), {})
'''

CONFIG = """
model:
  class_path: hinge.Hinge
  init_args:
    beta: 0.2
data:
  class_path: PreferenceData
  init_args:
    max_rows: 24
    batch_size: 4
"""

TEST = """
from hinge import Hinge, hinge_loss
from tests.objectives.contract import ObjectiveContract


class TestHinge(ObjectiveContract):
    objective = Hinge

    def loss(self, logratio):
        return hinge_loss(logratio, 0.1)

    def worked(self):
        yield [0.0, 0.0], 1.0
        yield [5.0, 0.0], 0.5
        yield [20.0, 0.0], 0.0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "hinge.py").write_text(OBJECTIVE)
    (tmp_path / "hinge.yaml").write_text(CONFIG)
    (tmp_path / "test_hinge.py").write_text(TEST)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_trains_by_the_command_line(folder: Path) -> None:
    quick = ["--trainer.max_steps=2", "--samples.prompts=2", "--samples.max_new_tokens=8", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", "hinge.yaml", *quick, "--run_dir", "run"]) == 0
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_it_passes_the_contract(folder: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(folder)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "test_hinge.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "7 passed" in done.stdout
