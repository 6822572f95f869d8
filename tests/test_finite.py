"""A loss or gradient that is not finite: the step leaves no trace but its count, and after a few the run ends."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from lit_align.batch import CompletionBatch, Loss
from lit_align.callbacks.loggers import Rows
from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.objectives.dpo import dpo_loss
from lit_align.settings import OptimSettings, PairSettings
from tests.families import save_tiny
from tests.objectives.contract import random_groups, train

SIZE = 4
"""Groups of a micro-batch; with no accumulation, rows 4 k to 4 k + 3 make step k + 1."""


def nan_loss(value: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    return torch.where(bad, torch.nan, value)


def infinite_loss(value: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    return torch.where(bad, torch.inf, value)


def nan_gradient(value: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    """The loss stays as it is; the slope of a square root at 0 is infinite, and 0 times that is not a number."""
    return value + (bad * (value - value.detach()) * 0).abs().sqrt()


FAULTS = [nan_loss, infinite_loss, nan_gradient]


class Faulty(AlignModule):
    """DPO with faults in the loss of some rows; counts the steps it adapts after."""

    def __init__(self, bad: set[int], fault: Callable[..., torch.Tensor], *args: Any) -> None:
        super().__init__(*args)
        self.bad, self.fault, self.adapted = bad, fault, 0

    def loss(self, batch: CompletionBatch) -> Loss:
        value = dpo_loss(self.score(batch).logratio, 0.1)
        bad = torch.tensor([row in self.bad for row in batch.row.tolist()])
        return Loss(self.fault(value, bad) if bad.any() else value, torch.ones_like(value), None, {})

    def adapt(self) -> None:
        self.adapted += 1


class Watch(Callback):
    """The weights and the optimizer's moments after each micro-batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        state = {name: value.detach().clone() for name, value in pl_module.named_parameters() if value.requires_grad}
        for index, kept in trainer.optimizers[0].state_dict()["state"].items():
            state |= {f"{name} {index}": value.clone() for name, value in kept.items()}
        self.seen.append(state)


def build(tmp_path: Path, bad: set[int], fault: Callable[..., torch.Tensor]) -> Faulty:
    model = str(tmp_path / "model")
    if not Path(model).exists():
        save_tiny("llama", model)
    return Faulty(bad, fault, PairSettings(model), OptimSettings(learning_rate=1e-2, warmup=0.0, schedule="constant"))


def run(
    tmp_path: Path, bad: set[int], fault: Callable[..., torch.Tensor] = nan_loss, batches: int = 4, **options: Any
) -> tuple[Faulty, Watch]:
    module, watch = build(tmp_path, bad, fault), Watch()
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    defaults = {"logger": Rows(folder), "default_root_dir": folder, "callbacks": [watch], "gradient_clip_val": 1.0}
    sizes, accumulate = [SIZE] * batches, options.pop("accumulate", 1)
    train(module, random_groups(SIZE * batches, 2), sizes, accumulate, **defaults | options)
    return module, watch


def logged(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "run" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_step_is_not_taken_and_the_run_goes_on(tmp_path: Path, fault: Callable[..., torch.Tensor]) -> None:
    module, watch = run(tmp_path, {5}, fault)
    first, second, third, fourth = watch.seen
    assert same(first, second)
    assert not same(second, third)
    assert not same(third, fourth)
    assert all(value.isfinite().all() for state in watch.seen for value in state.values())
    assert module.adapted == 3
    assert module.trainer.global_step == 4


def test_the_steps_after_it_are_those_of_a_run_that_never_met_it(tmp_path: Path) -> None:
    """Of an accumulated step one micro-batch is bad; the others of it must not leak into the next step either."""
    groups = random_groups(24, 2)
    good = torch.cat([torch.arange(8), torch.arange(16, 24)])
    states = []
    for data, sizes, bad in (
        (groups, [4] * 6, {13}),
        (CompletionBatch(*(v if v is None else v[good] for v in groups)), [4] * 4, set()),
    ):
        module, watch = build(tmp_path, bad, nan_loss), Watch()
        train(module, data, sizes, 2, callbacks=[watch], default_root_dir=tmp_path)
        states.append(watch.seen[-1])
    assert same(*states)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rows_are_written_down(tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: Callable[..., Any]) -> None:
    run(tmp_path, {9}, fault, accumulate=2, batches=6)
    (line,) = (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()
    record = json.loads(line)
    of_loss = fault is not nan_gradient
    assert record["step"] == 2
    assert record["not_finite"] == ("loss" if of_loss else "gradient")
    assert record["rows"] == (list(range(8, 12)) if of_loss else list(range(8, 16)))
    assert "STEP 2 SKIPPED" in caplog.text


def test_it_is_logged_as_what_it_is_and_never_as_0(tmp_path: Path) -> None:
    run(tmp_path, {5})
    rows = logged(tmp_path)
    assert [bool(row["train/loss"]) for row in rows] == [True, False, True, True]
    assert all(
        math.isfinite(float(row["train/loss"])) and float(row["train/loss"]) > 0 for row in rows if row["train/loss"]
    )
    assert [row["train/skipped_steps"] for row in rows] == ["", "1.0", "1.0", "1.0"]


def test_it_is_left_out_of_the_mean_of_an_interval(tmp_path: Path) -> None:
    """At the start every loss is ln 2, and the skipped step changes nothing: so is the mean of the first two."""
    run(tmp_path, {1}, batches=2, log_every_n_steps=2)
    (row,) = logged(tmp_path)
    assert float(row["train/loss"]) == pytest.approx(math.log(2))


def test_three_in_a_row_are_skipped_and_a_good_one_starts_the_count_anew(tmp_path: Path) -> None:
    module, watch = run(tmp_path, {0, 4, 8, 16, 20, 24}, batches=8)
    assert module.adapted == 2
    assert same(watch.seen[0], watch.seen[2])


def test_four_in_a_row_end_the_run_with_finite_weights(tmp_path: Path) -> None:
    module = build(tmp_path, {4, 8, 12, 16}, nan_loss)
    watch = Watch()
    with pytest.raises(UserError, match=r"4 optimizer steps in a row .* data rows 16, 17, 18, 19: .* of step 1\."):
        train(module, random_groups(32, 2), [SIZE] * 8, 1, callbacks=[watch], default_root_dir=tmp_path)
    assert same(watch.seen[0], watch.seen[-1])
    assert all(value.isfinite().all() for value in watch.seen[-1].values())


def test_a_rank_without_a_fault_skips_with_the_one_that_has_it(tmp_path: Path) -> None:
    """Rank 1 gets micro-batches 1 and 3, so row 5 is its alone."""
    module = build(tmp_path, {5}, nan_gradient)
    options = {"strategy": "ddp_spawn", "devices": 2, "default_root_dir": tmp_path, "callbacks": [Keep(tmp_path)]}
    train(module, random_groups(16, 2), [SIZE] * 4, 1, **options)
    kept = [torch.load(tmp_path / f"rank{rank}") for rank in (0, 1)]
    assert kept[0]["adapted"] == kept[1]["adapted"] == 1
    assert same(kept[0]["weights"], kept[1]["weights"])
    (line,) = (tmp_path / "skipped_steps.jsonl").read_text().splitlines()
    assert json.loads(line)["rows"] == list(range(8))  # the gradient was not finite on both, after they were added up


class Keep(Callback):
    """Writes the outcome of each rank to a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = {name: value.detach() for name, value in pl_module.named_parameters() if value.requires_grad}
        torch.save({"weights": weights, "adapted": pl_module.adapted}, self.folder / f"rank{trainer.global_rank}")


def test_a_gradient_scaler_may_look_for_its_scale_without_end_or_adaptation(tmp_path: Path) -> None:
    """From 2^30 gradients overflow half precision; halving finds a scale at which they fit; nothing is blamed."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=10**6)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module, watch = run(tmp_path, set(), batches=30, plugins=[plugin])
    taken = sum(not same(*pair) for pair in zip(watch.seen, watch.seen[1:], strict=False)) + (
        "exp_avg 0" in watch.seen[0]
    )
    assert 0 < module.adapted < 30
    assert module.adapted == taken
    assert not (tmp_path / "run" / "skipped_steps.jsonl").exists()
    assert all(value.isfinite().all() for value in watch.seen[-1].values())
