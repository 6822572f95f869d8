"""The line that is printed before the model is loaded, and the warning where the device is too small."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lit_align.callbacks import memory
from lit_align.callbacks.memory import MemoryPlan, remedy
from lit_align.data import OnPolicyData, PreferenceData
from lit_align.objectives import DPO
from lit_align.planner import Estimate, Planner
from lit_align.settings import PairSettings
from tests.callbacks.toy import ToyData, ToyModule, trainer
from tests.data.conftest import byte_tokenizer, pair_rows, write_jsonl
from tests.families import save_tiny


@pytest.fixture
def model(tmp_path: Path) -> str:
    tokenizer = byte_tokenizer()
    folder = save_tiny("llama", tmp_path / "model", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)
    return folder


def data(folder: Path, **options: Any) -> PreferenceData:
    long = {"prompt": "Q" * 30, "chosen": " yes", "rejected": " no"}
    rows = write_jsonl(folder / "rows.jsonl", [*pair_rows(12), long])
    return PreferenceData(str(rows), validation_size=0, batch_size=4, max_length=64, **options)


class Loaded(Callback):
    """Notes whether the model was there when the plan was printed."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.pair = pl_module.pair


def test_the_plan_comes_before_the_model_and_the_peak_after(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = Loaded()
    trainer(MemoryPlan(), after, max_epochs=1).fit(DPO(pair=PairSettings(model)), datamodule=data(tmp_path))
    assert after.pair is None
    plan, found = (line for line in capsys.readouterr().out.splitlines() if line.startswith("memory:"))
    longest = len(byte_tokenizer()("Q" * 30)["input_ids"]) + len(" yes") + len(" no") + 2
    assert f"of the longest groups ({longest} tokens)" in plan
    assert "program" in plan
    assert "the peak was" in found


def test_the_heaviest_batches_have_most_tokens_and_the_longest_group(tmp_path: Path) -> None:
    rows = data(tmp_path)
    rows.load(byte_tokenizer())
    batches = list(rows.train_dataloader())
    totals = [int(batch.prompt_mask.sum() + batch.completion_mask.sum()) for batch in batches]
    (most,), (longest,) = memory.heaviest(rows, 1)
    assert int(most.prompt_mask.sum() + most.completion_mask.sum()) == max(totals)
    assert longest.prompt_mask.sum(-1).max() == 30


def test_fresh_completions_are_planned_at_their_full_budget(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Q" * n} for n in range(1, 9)])
    fresh = OnPolicyData(
        str(rows), len, completions=4, buffer=16, minibatch=8, max_new_tokens=9, validation_size=0, select="ranked"
    )
    fresh.load(byte_tokenizer())
    ((batch,),) = memory.heaviest(fresh, 1)
    assert batch.prompt_mask.sum(-1).tolist() == [7, 8]
    assert batch.lengths.tolist() == [[9] * 4] * 2


def test_a_plan_leaves_the_random_numbers_of_the_run_alone(model: str, tmp_path: Path) -> None:
    """Or the adapter would start elsewhere, and so would all that is learned."""
    rows = data(tmp_path)
    rows.load(byte_tokenizer())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert memory.plan(PairSettings(model), rows, torch.device("cpu"), 1) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_device_that_is_too_small_is_warned_of(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings, rows = PairSettings(model), data(tmp_path)
    rows.load(byte_tokenizer())
    planner = Planner(settings, torch.device("cpu"))
    groups = [group for step in memory.heaviest(rows, 1) for group in memory.groups_of(step[0])]
    alone = planner.estimate(planner.load(max(groups, key=memory.tokens_of)))
    monkeypatch.setattr(memory, "free", lambda device: alone.total + 1000)
    with caplog.at_level(logging.WARNING):
        trainer(MemoryPlan(), max_epochs=1, limit_train_batches=1).fit(DPO(pair=settings), datamodule=data(tmp_path))
    assert "the expected peak exceeds" in caplog.text
    assert "set data.batch_size to at most 1," in caplog.text


@pytest.mark.parametrize(
    ("largest", "options", "words"),
    [
        (3, {}, "data.batch_size to at most 3"),
        (0, {}, "model.pair.gradient_checkpointing=true"),
        (0, {"gradient_checkpointing": True}, "model.pair.quantization=nf4"),
        (0, {"gradient_checkpointing": True, "quantization": "nf4"}, "lower data.max_length"),
    ],
)
def test_the_remedy_is_what_helps_most(largest: int, options: dict[str, Any], words: str) -> None:
    estimate = Estimate(base=90, adapter=10, reference=5, activations=50, head=5, backward=1)
    assert words in remedy(estimate, 100, largest, PairSettings(**options))


def test_modules_and_data_that_tell_nothing_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(MemoryPlan()).fit(ToyModule(), datamodule=ToyData())
    assert "memory:" not in capsys.readouterr().out


def test_a_kernel_that_leaves_lines_out_costs_no_run() -> None:
    assert memory._kilobytes("VmPeak:\t  20 kB\nVmHWM:\t  12 kB\n", "VmHWM") == 12 * 1024
    assert memory._kilobytes("VmPeak:\t  20 kB\n", "VmHWM") is None
