"""Samples beside pairs: drawn at the right steps, seen whole by every step, the same after a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.batch import CompletionBatch, MixedBatch, Rollout, Sampling, completions_of
from lit_align.data import MixedData, PreferenceData
from lit_align.data.rows import DataError
from tests.data.conftest import byte_tokenizer, pair_rows, write_jsonl

BATCHES, EPOCHS, SAMPLES = 7, 3, 12  # 13 training rows in batches of 2


class Drawing(LightningModule):
    """Draws completions that tell the place in the stream and the policy's one weight, and writes down what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = byte_tokenizer()
        self.draws: list[tuple[int, list[int], list[list[int]], float]] = []
        self.measured: list[int] = []
        self.seen: list[tuple[int, list[int], list[list[float]]]] = []
        self.validated: list[int] = []

    def generate(self, prompts: CompletionBatch, completions: int, sampling: Sampling) -> Rollout:
        assert (completions, sampling.top_k, sampling.top_p, sampling.temperature) == (1, 0, 1.0, None)
        step, now = self.trainer.global_step, self.weight.item()
        asked = [ids[mask].tolist() for ids, mask in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)]
        self.draws.append((step, prompts.row.tolist(), asked, now))
        ids = prompts.row[:, None, None] % sampling.max_new_tokens
        drawn = prompts._replace(
            completion_ids=ids,
            completion_mask=torch.ones_like(ids, dtype=torch.bool),
            reward=None,
            present=torch.ones(ids.shape[:2], dtype=torch.bool),
        )
        return Rollout(drawn, old_logps=torch.full(ids.shape, now), drawn_at=torch.full_like(prompts.row, step))

    def observe(self, rollout: Rollout, seconds: float) -> None:
        self.measured.append(len(rollout.completions.row))

    def training_step(self, batch: MixedBatch, batch_idx: int) -> torch.Tensor:
        samples = batch.samples
        columns = (samples.completions.row, samples.completions.completion_ids, samples.old_logps, samples.drawn_at)
        known = [column.flatten().tolist() for column in columns if column is not None]
        self.seen.append((self.trainer.global_step, batch.preference.row.tolist(), known))
        return self.weight.sum() * batch.preference.row.sum()

    def validation_step(self, batch: CompletionBatch, batch_idx: int) -> None:
        assert isinstance(batch, CompletionBatch)
        self.validated += batch.row.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "pairs").mkdir()
    write_jsonl(tmp_path / "pairs" / "train.jsonl", pair_rows(13))
    write_jsonl(tmp_path / "pairs" / "validation.jsonl", pair_rows(3))
    return str(tmp_path / "pairs")


def fit(
    source: str, saved: Path | None = None, resume: Path | None = None, options: Any = None, **trainer: Any
) -> Drawing:
    module = Drawing()
    data = MixedData(source, **{"samples": SAMPLES, "every_n_steps": 3, "batch_size": 2, **(options or {})})
    saver = [ModelCheckpoint(saved, save_top_k=-1, filename="{step}", every_n_train_steps=1)] if saved else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    runner = Trainer(
        **{"accelerator": "cpu", "max_epochs": EPOCHS, "num_sanity_val_steps": 0, **quiet, **trainer},
        enable_checkpointing=saved is not None,
        callbacks=saver,
    )
    runner.fit(module, data, ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])
@pytest.mark.parametrize("every", [1, 3, 8])
def test_samples_are_drawn_by_the_policy_of_the_first_step_they_serve(source: str, accumulate: int, every: int) -> None:
    module = fit(source, options={"every_n_steps": every}, accumulate_grad_batches=accumulate)
    steps = EPOCHS * -(-BATCHES // accumulate)
    assert [step for step, *_ in module.draws] == list(range(0, steps, every))
    weights = [now for *_, now in module.draws]
    assert len(set(weights)) == len(weights)  # each after the update before it
    assert module.measured == [SAMPLES] * len(weights)
    for step in range(steps):
        seen = [columns for taken, _, columns in module.seen if taken == step]
        _, places, _, now = module.draws[step // every]
        found = [[value for columns in seen for value in columns[i]] for i in range(4)]
        assert found[1] == [place % 64 for place in places]  # all of them, once, whatever the cut
        assert set(found[2]) == {now}
        assert set(found[3]) == {step // every * every}
        sizes = [len(columns[0]) for columns in seen]
        assert max(sizes) - min(sizes) <= 1


def test_a_shortened_epoch_ends_with_a_step_that_sees_all_samples(source: str) -> None:
    module = fit(source, accumulate_grad_batches=4, limit_train_batches=5, max_epochs=1)
    assert [len(columns[0]) for _, _, columns in module.seen] == [3, 3, 3, 3, 12]


def test_the_pairs_come_as_without_samples_and_in_validation_alone(source: str) -> None:
    module = fit(source, max_epochs=1)
    data = PreferenceData(source, batch_size=2)
    data.load(byte_tokenizer())
    assert [rows for _, rows, _ in module.seen] == [batch.row.tolist() for batch in data.train_dataloader()]
    assert module.validated == [0, 1, 2]


def test_prompts_are_those_of_training_in_an_order_of_their_own(source: str) -> None:
    module = fit(source, max_epochs=1)
    tokenizer = byte_tokenizer()
    asked = [tokenizer.decode(ids) for _, _, prompts, _ in module.draws for ids in prompts]
    wanted = {row["prompt"] for row in pair_rows(13)}
    assert len(module.draws) * SAMPLES == len(asked) == 36
    assert set(asked[:13]) == set(asked[13:26]) == wanted  # each once, then again
    rows = [row for _, seen, _ in module.seen for row in seen]
    assert asked[:13] != [f"Q{row:03d}" for row in rows]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_step_resumes_with_the_samples_it_had(source: str, tmp_path: Path, accumulate: int) -> None:
    folder, options = tmp_path / "steps", {"accumulate_grad_batches": accumulate}
    whole = fit(source, saved=folder, **options)
    for step in (1, 2, 3, 4, 5, 8):
        resumed = fit(source, resume=folder / f"step={step}.ckpt", **options)
        assert resumed.seen == [entry for entry in whole.seen if entry[0] >= step], step
        assert resumed.draws == [draw for draw in whole.draws if draw[0] >= step], step


def test_other_settings_of_the_samples_draw_anew_and_go_on_in_the_stream(source: str, tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    fit(source, saved=folder, max_steps=2)
    resumed = fit(source, resume=folder / "step=2.ckpt", options={"samples": 5})
    step, places, *_ = resumed.draws[0]
    assert (step, places) == (2, [12, 13, 14, 15, 16])


RANKS = """
import json, sys
import torch
from tests.data.test_mixed import fit
if __name__ == "__main__":
    source, folder, resume = sys.argv[1:4]
    module = fit(source, resume=resume or None, saved=None if resume else folder, options={"batch_size": 1},
        devices=2, strategy="ddp", use_distributed_sampler=False, max_epochs=1)
    with open(f"{folder}/{'again' if resume else 'whole'}{module.global_rank}.json", "w") as file:
        json.dump([module.draws, module.seen], file)
"""


def test_ranks_draw_shares_of_their_own_and_resume_them(source: str, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for resume in ("", str(tmp_path / "step=4.ckpt")):
        command = [sys.executable, str(script), source, str(tmp_path), resume]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=240, capture_output=True)
    whole, again = (
        [json.loads((tmp_path / f"{name}{rank}.json").read_text()) for rank in (0, 1)] for name in ("whole", "again")
    )
    (first, _), (second, _) = whole
    assert [draw[0] for draw in first] == [draw[0] for draw in second] == [0, 3]
    for number, (own, other) in enumerate(zip(first, second, strict=True)):
        start = number * SAMPLES
        assert (own[1], other[1]) == tuple(list(range(start + rank, start + SAMPLES, 2)) for rank in (0, 1))
    alone = fit(source, max_epochs=1)
    assert [*first[0][2], *second[0][2]] == alone.draws[0][2][0::2] + alone.draws[0][2][1::2]
    for (_, seen), (draws, resumed) in zip(whole, again, strict=True):
        assert draws == []
        assert resumed == [entry for entry in seen if entry[0] >= 4] != []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, r"data.samples=0 must be at least 1"),
        ({"every_n_steps": 0}, r"data.every_n_steps=0 must be at least 1"),
        ({"max_new_tokens": 0}, r"data.max_new_tokens=0 must be at least 1"),
        ({"max_length": 100, "max_new_tokens": 51}, r"max_new_tokens=51 must be from 1 to 50, .*raise max_length"),
        ({"num_workers": 2}, r"data.num_workers=2 must be 0 .*leave it out"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MixedData(**options)  # type: ignore[arg-type]


def test_samples_that_micro_batches_cannot_share_are_refused(source: str) -> None:
    with pytest.raises(DataError, match=r"data.samples=12 must be a multiple of 5, .* 1 ranks times 5 .*example 15"):
        fit(source, accumulate_grad_batches=5)


def test_examples_are_pairs_beside_samples(source: str) -> None:
    data = MixedData(source)
    data.load(byte_tokenizer())
    batch = data.examples(4)
    assert completions_of(batch).present.shape == (3, 2)  # what validation has
    assert batch.samples.completions.completion_mask.shape == (3, 1, 1)
