"""Estimates of memory: against what the architecture says by hand, and against the process's resident memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.ledger import Ledger
from lit_align.planner import HOLES, Load, Planner
from lit_align.rehearsal import walk
from lit_align.settings import LoraSettings, PairSettings
from tests.families import FAMILIES, save_tiny
from tests.objectives.contract import random_groups

CPU = torch.device("cpu")
H, HEADS, KV, M, LAYERS, V, R, D = 64, 4, 2, 160, 3, 1000, 4, 16


def llama(folder: Path, **changes: Any) -> str:
    sizes = {"hidden_size": H, "num_attention_heads": HEADS, "num_key_value_heads": KV, "intermediate_size": M}
    return save_tiny("llama", folder, **{**sizes, "num_hidden_layers": LAYERS, "vocab_size": V, **changes})


def planner(model: str, **options: Any) -> Planner:
    return Planner(PairSettings(model, lora=LoraSettings(r=R), **options), CPU)


def test_the_ledger_counts_what_lives() -> None:
    with torch.device("meta"), Ledger() as ledger:
        a = torch.zeros(10, 100)
        b = a + 1
        assert (ledger.live, ledger.peak) == (8000, 8000)
        c = b.t().reshape(-1)  # which copies what it cannot view
        assert ledger.live == 12000
        del b
        assert (ledger.live, ledger.peak) == (8000, 12000)
        assert ledger.mark() == ledger.peak == 8000
        del a, c
        assert ledger.live == 0


def test_the_weights_count_by_their_precision(tmp_path: Path) -> None:
    model = llama(tmp_path, tie_word_embeddings=False)
    linear = LAYERS * (2 * H * H + 2 * H * KV * D + 3 * H * M)
    rest = 2 * V * H + (2 * LAYERS + 1) * H
    load = Load(1, 8, 4)
    assert planner(model).estimate(load).base == 4 * (linear + rest)
    assert planner(model, dtype="bfloat16").estimate(load).base == 2 * (linear + rest)
    assert planner(model, quantization="int8").estimate(load).base == linear + 4 * rest
    nf4 = planner(model, quantization="nf4").estimate(load).base
    assert nf4 == pytest.approx(linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 4 * rest, abs=1)


def test_the_adapter_counts_with_gradient_and_moments(tmp_path: Path) -> None:
    sides = [(H, H), (H, KV * D), (H, KV * D), (H, H), (H, M), (H, M), (M, H)]
    adapter = 4 * R * LAYERS * sum(map(sum, sides))
    model = llama(tmp_path)
    assert planner(model).estimate(Load(1, 8, 4)).adapter == 4 * adapter
    assert planner(model, dtype="bfloat16").estimate(Load(1, 8, 4)).adapter == 4 * adapter


def test_activations_are_those_the_architecture_keeps(tmp_path: Path) -> None:
    """Of each token and layer: the inputs of both norms and their outputs; queries, keys and values for every head and
    the output of attention, with a number for each head; the gate before and after its nonlinearity, the other branch
    and their product; what stands between the two factors of each of seven adapters."""
    rows, length = 3, 200
    token = LAYERS * (4 * H + 4 * HEADS * D + HEADS + 4 * M + 7 * R)
    kept = walk(planner(llama(tmp_path)).model, rows, length).kept
    assert kept == pytest.approx(4 * rows * length * token, rel=0.05)


def test_checkpointing_keeps_the_inputs_of_layers(tmp_path: Path) -> None:
    rows, length = 3, 200
    model = llama(tmp_path, num_hidden_layers=12)
    plain, saving = (walk(planner(model, gradient_checkpointing=on).model, rows, length) for on in (False, True))
    assert saving.kept == pytest.approx(4 * rows * length * 12 * H, rel=0.25)
    assert saving.backward < 0.4 * plain.backward


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_walked_and_grows_with_its_rows(family: str, tmp_path: Path) -> None:
    found = planner(save_tiny(family, tmp_path))
    one, two, five = (walk(found.model, rows, 24) for rows in (1, 2, 5))
    # A peak is the highest of several moments, and which of them it is can change with the rows.
    assert one.along(two, 5).backward == pytest.approx(five.backward, rel=0.01)
    assert one.along(two, 5).kept == five.kept
    assert one.kept < two.kept
    assert one.reference < one.kept


def test_the_largest_micro_batch_is_the_last_that_fits(tmp_path: Path) -> None:
    found, group, memory = planner(llama(tmp_path)), Load(1, 50, 20, 2500), 50_000_000
    largest = found.largest(group, memory)
    assert largest > 1
    assert found.estimate(group.times(largest)).total <= memory < found.estimate(group.times(largest + 1)).total
    assert found.largest(group, found.estimate(group).held) == 0


def test_holes_are_a_share_of_the_passes_on_a_cpu_alone(tmp_path: Path) -> None:
    model, load = llama(tmp_path), Load(2, 50, 40)
    cpu = planner(model).estimate(load)
    assert cpu.total == cpu.held + cpu.passes + round(HOLES[False] * cpu.passes)
    assert Planner(PairSettings(model), torch.device("cuda")).estimate(load).holes == 0


def test_masks_are_those_of_groups_on_a_cpu_and_of_rows_on_a_gpu(tmp_path: Path) -> None:
    model, batch = llama(tmp_path), random_groups(5, 2)
    sizes = batch.prompt_mask.sum(-1) + batch.lengths.sum(-1)
    load = planner(model).load(batch)
    assert load.masked == sum(size**2 for size in sizes.tolist())
    assert load.rows * load.length >= int(sizes.sum()) > load.rows * (load.length - 1)
    whole = Planner(PairSettings(model), torch.device("cuda")).load(batch)
    assert whole.masked == whole.rows * whole.length**2
    assert load.scored == whole.scored == int(batch.lengths.sum())
    one, none = (planner(model).estimate(one).passes for one in (load, load._replace(masked=0)))
    assert one - none == 4 * load.masked


def test_a_saved_adapter_counts_twice(tmp_path: Path) -> None:
    from lit_align.pair import PolicyReferencePair

    model = llama(tmp_path / "model")
    PolicyReferencePair(PairSettings(model, lora=LoraSettings(r=R))).save_adapter(tmp_path / "adapter")
    fresh = planner(model).estimate(Load(1, 8, 4))
    settings = PairSettings(model, lora=LoraSettings(adapter=str(tmp_path / "adapter")))
    assert Planner(settings, CPU).estimate(Load(1, 8, 4)).adapter == fresh.adapter * 5 // 4


@pytest.mark.parametrize("saved", [False, True])
def test_a_reference_that_moves_has_an_adapter_and_another_one_stays(tmp_path: Path, saved: bool) -> None:
    """Trained weights count four times, with gradient and moments; each copy once."""
    from lit_align.pair import PolicyReferencePair

    model = llama(tmp_path / "model")
    PolicyReferencePair(PairSettings(model, lora=LoraSettings(r=R))).save_adapter(tmp_path / "adapter")
    fresh = planner(model).estimate(Load(1, 8, 4))
    lora = LoraSettings(r=R, adapter=str(tmp_path / "adapter") if saved else None)
    moving = Planner(PairSettings(model, lora=lora), CPU, moving=True)
    assert moving.estimate(Load(1, 8, 4)).adapter == fresh.adapter * 6 // 4


MEASURE = """
import os, sys
from pathlib import Path
import torch
from lit_align.data.collate import Group, collate
from lit_align.objectives.dpo import dpo_loss
from lit_align.pair import PolicyReferencePair
from lit_align.settings import PairSettings

def status(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

torch.set_num_threads(1)
model, checkpointing = sys.argv[1], sys.argv[2] == "True"
pair = PolicyReferencePair(PairSettings(model, gradient_checkpointing=checkpointing))
trained = [parameter for parameter in pair.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained)

def step(rows, prompt, completion):
    ids = torch.arange(3, 3 + max(prompt, completion), dtype=torch.int32)
    groups = [Group(row, ids[:prompt], [ids[:completion], ids[1:completion]], None) for row in range(rows)]
    dpo_loss(pair.score(collate(groups), kl=True).logratio, 0.1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()

step(1, 4, 4)  # what is made at first use
held = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
for _ in range(2):
    step(*map(int, sys.argv[3:]))
print(status("VmHWM") - held)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize(("checkpointing", "batch"), [(False, (8, 100, 51)), (True, (16, 200, 101))])
def test_the_tensors_of_the_passes_are_what_a_step_takes(
    checkpointing: bool, batch: tuple[int, int, int], tmp_path: Path
) -> None:
    """With a C library that gives every large tensor back at once, so that there are no holes."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 8000}
    model = llama(tmp_path, **sizes)
    quiet = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    options = {"capture_output": True, "text": True, "check": True, "env": os.environ | quiet}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, model, str(checkpointing), *map(str, batch)]
    measured = json.loads(subprocess.run(command, **options).stdout.splitlines()[-1])  # type: ignore[call-overload]
    rows, prompt, completion = batch
    found = Planner(PairSettings(model, gradient_checkpointing=checkpointing), CPU)
    length = prompt + 2 * completion - 1
    estimate = found.estimate(Load(rows, length, rows * (2 * completion - 1), rows * length**2))
    assert estimate.passes / measured == pytest.approx(1, abs=0.22)
