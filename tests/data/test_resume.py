"""Exact resume with Lightning's own loops: the rows of every batch equal those of a run that was never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.data import PreferenceData
from tests.data.conftest import byte_tokenizer, pair_rows, write_jsonl

BATCHES, EPOCHS = 7, 3  # 13 training rows in batches of 2


class Recorder(LightningModule):
    """Writes down the rows of each training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = byte_tokenizer()
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.row.tolist())
        return (self.weight * batch.completion_mask.sum()).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch.row.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", pair_rows(13))
    write_jsonl(folder / "validation.jsonl", pair_rows(3))
    return folder


def fit(
    source: Path,
    resume: Path | None = None,
    workers: int = 0,
    checkpoints: dict | None = None,
    window: int = 1,
    **trainer,
) -> Recorder:
    module = Recorder()
    data = PreferenceData(str(source), batch_size=2, num_workers=workers, length_window=window)
    callbacks = [ModelCheckpoint(save_top_k=-1, filename="{step}", **checkpoints)] if checkpoints else []
    options = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **trainer}
    Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(checkpoints),
        callbacks=callbacks,
        **options,
    ).fit(module, data, ckpt_path=resume, weights_only=True)
    return module


def test_an_epoch_is_every_row_once_and_epochs_differ(source):
    module = fit(source)
    epochs = [module.seen[start : start + BATCHES] for start in range(0, EPOCHS * BATCHES, BATCHES)]
    assert [sorted(row for batch in epoch for row in batch) for epoch in epochs] == [list(range(13))] * EPOCHS
    assert len({str(epoch) for epoch in epochs}) == EPOCHS
    assert module.validated == [0, 1, 2] * EPOCHS


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"num_sanity_val_steps": 2},
        {"limit_val_batches": 0},
        {"val_check_interval": 3},
        {"limit_train_batches": 5},
        {"max_epochs": -1, "max_steps": 17},
    ],
)
def test_every_step_resumes_exactly(source, tmp_path, trainer):
    folder = tmp_path / "steps"
    whole = fit(source, checkpoints={"dirpath": folder, "every_n_train_steps": 1}, **trainer).seen
    for step in (1, 3, 5, 6, 7, 8, 10, 14, 15):
        resumed = fit(source, folder / f"step={step}.ckpt", **trainer).seen
        assert resumed == whole[step:], step


def test_batches_of_similar_length_resume_exactly(source, tmp_path):
    folder = tmp_path / "steps"
    whole = fit(source, checkpoints={"dirpath": folder, "every_n_train_steps": 1}, window=3).seen
    assert whole != fit(source).seen
    for step in (1, 3, 6, 7, 8, 14, 15):
        assert fit(source, folder / f"step={step}.ckpt", window=3).seen == whole[step:], step


def test_accumulated_steps_resume_exactly(source, tmp_path):
    folder = tmp_path / "steps"
    options = {"accumulate_grad_batches": 2}
    whole = fit(source, checkpoints={"dirpath": folder, "every_n_train_steps": 1}, **options).seen
    # 7 batches make 4 optimizer steps; the last of an epoch has one batch.
    for step, batches in ((1, 2), (3, 6), (4, 7), (5, 9), (8, 14)):
        assert fit(source, folder / f"step={step}.ckpt", **options).seen == whole[batches:], step


@pytest.mark.parametrize("when", [{"save_on_train_epoch_end": True}, {"save_on_train_epoch_end": False}])
def test_the_end_of_an_epoch_resumes_exactly(source, tmp_path, when):
    folder = tmp_path / "epochs"
    whole = fit(source, checkpoints={"dirpath": folder, "every_n_epochs": 1, **when}).seen
    for step in (BATCHES, 2 * BATCHES):
        assert fit(source, folder / f"step={step}.ckpt").seen == whole[step:], step


def test_workers_that_fetch_ahead_do_not_move_the_position(source, tmp_path):
    folder = tmp_path / "steps"
    whole = fit(source).seen
    checkpoints = {"dirpath": folder, "every_n_train_steps": 3}
    assert fit(source, workers=2, max_epochs=2, checkpoints=checkpoints).seen == whole[:14]
    assert fit(source, folder / "step=3.ckpt", workers=2, max_epochs=2).seen == whole[3:14]


def test_overfitting_on_purpose_repeats_the_same_rows(source):
    module = fit(source, overfit_batches=2)
    assert module.seen == [[0, 1], [2, 3]] * EPOCHS


def test_two_ranks_share_the_batches_of_one(source, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, sys\n"
        "import torch\n"
        "from lightning import Trainer\n"
        "from lit_align.data import PreferenceData\n"
        "from tests.data.test_resume import Recorder\n"
        "if __name__ == '__main__':\n"
        "    module, data = Recorder(), PreferenceData(sys.argv[1], batch_size=1)\n"
        "    trainer = Trainer(accelerator='cpu', devices=2, strategy='ddp', max_epochs=1, logger=False,\n"
        "        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,\n"
        "        num_sanity_val_steps=0, use_distributed_sampler=False)\n"
        "    trainer.fit(module, data)\n"
        "    with open(f'{sys.argv[2]}/{trainer.global_rank}.json', 'w') as file:\n"
        "        json.dump([module.seen, module.validated], file)\n"
    )
    import json
    import os
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(source), str(tmp_path)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=240, capture_output=True)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    alone = fit(source, max_epochs=1).seen
    together = [[*first, *second] for first, second in zip(ranks[0][0], ranks[1][0], strict=True)]
    assert together == alone[:6]  # the 13th row is too few for two ranks
    assert sorted(ranks[0][1] + ranks[1][1]) == [0, 1, 2]
