"""The memory a run is going to take, said before the model is loaded, and what it took."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lit_align.batch import CompletionBatch
from lit_align.data.collate import Group, collate
from lit_align.data.completions import CompletionData
from lit_align.data.mixed import MixedData
from lit_align.data.on_policy import OnPolicyData
from lit_align.errors import UserError
from lit_align.kv_cache import memory
from lit_align.planner import Estimate, Planner
from lit_align.settings import PairSettings

log = logging.getLogger(__name__)

LATER = 100_000_000
"""Bytes that libraries take between the plan and the first step, measured."""

UNTOLD = "the memory of this run cannot be told beforehand: %s"


class MemoryPlan(Callback):
    """Prints the expected peak and the largest micro-batch, and warns where the device does not hold it.

    On a CPU the peak is that of the process's resident memory, on a GPU that of ``torch.cuda.max_memory_allocated``.
    Drawing completions is not in it, and fresh ones are taken to fill their budget. The end of the run says what it
    was.
    """

    def __init__(self) -> None:
        self.expected: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan, once the data has been read and before the model is loaded.

        Raises:
            UserError: If there is no such model.
        """
        settings: PairSettings | None = getattr(pl_module, "pair_settings", None)
        if stage != "fit" or settings is None or not trainer.is_global_zero:
            return
        share = trainer.world_size * trainer.accumulate_grad_batches
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        moving = getattr(pl_module, "moves_reference", False)
        self.expected = plan(settings, data, trainer.strategy.root_device, share, moving)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what it was."""
        if self.expected is not None:
            found = peak(trainer.strategy.root_device)
            print(f"memory: the peak was {_size(found)}, {found / self.expected:.2f} of what was expected", flush=True)


def plan(settings: PairSettings, data: Any, device: torch.device, share: int, moving: bool = False) -> int | None:
    """Print what a run is expected to take, and warn where that is more than there is.

    Args:
        settings: Model, precision and adapter.
        data: The data module, loaded.
        device: Where the run would be.
        share: Micro-batches of an optimizer step, over all ranks.
        moving: Whether the reference moves.

    Returns:
        Bytes of the expected peak, or None where it cannot be told; the log then says why.

    Raises:
        UserError: If there is no such model.
    """
    try:
        with isolate_rng(include_cuda=False):  # the adapter's first weights are the same with and without a plan
            return _plan(settings, data, device, share, moving)
    except UserError:
        raise
    except Exception as error:  # an unusual model may raise anything when it is walked through without weights
        log.info(UNTOLD, f"{type(error).__name__}: {error}")
        return None


def _plan(settings: PairSettings, data: Any, device: torch.device, share: int, moving: bool) -> int | None:
    steps = heaviest(data, share)
    if not steps:
        log.info(UNTOLD, f"{type(data).__name__} does not say its batches")
        return None
    planner = Planner(settings, device, moving)
    estimate = max((planner.together(step) for step in steps), key=lambda one: one.total)
    longest = max((group for step in steps for group in groups_of(step[0])), key=tokens_of)
    own, room = program(device), free(device)
    largest = planner.largest(planner.load(longest), room)
    fresh = isinstance(data, OnPolicyData | MixedData)
    line = plan_line(estimate, own, room, largest, int(tokens_of(longest)), device)
    print(line + ("; completions to be drawn are taken to fill their budget" if fresh else ""), flush=True)
    if estimate.total > room:
        log.warning("%s", remedy(estimate, room, largest, settings))
    return own + estimate.total


def plan_line(estimate: Estimate, own: int, room: int, largest: int, tokens: int, device: torch.device) -> str:
    """What the user reads: the expected peak, its parts, and the largest micro-batch.

    Args:
        estimate: Of the heaviest micro-batch.
        own: Bytes the program itself holds.
        room: Bytes the device has left.
        largest: Most of the longest groups in a micro-batch.
        tokens: Tokens of the longest group.
        device: Where.
    """
    parts = ({"program": own} if own else {}) | estimate.parts()
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    return (
        f"memory: a peak of {_size(own + estimate.total)} is expected ({listed}); {device.type} has "
        f"{_size(own + room)}, enough for micro-batches of {largest:,} of the longest groups ({tokens:,} tokens)"
    )


def remedy(estimate: Estimate, room: int, largest: int, settings: PairSettings) -> str:
    """What to lower where the device is too small."""
    if largest:
        what = f"set data.batch_size to at most {largest}, and trainer.accumulate_grad_batches to make up for it"
    elif not settings.gradient_checkpointing:
        what = "set model.pair.gradient_checkpointing=true, and lower data.max_length if that is not enough"
    elif settings.quantization in {"none", "auto"} and estimate.held > room / 2:
        what = "set model.pair.quantization=nf4, or choose a smaller model"
    else:
        what = "lower data.max_length, or choose a smaller model"
    return f"the expected peak exceeds the {_size(room)} that are left by {_size(estimate.total - room)}: {what}"


def heaviest(data: Any, share: int) -> list[list[CompletionBatch]]:
    """The training micro-batches of most tokens and with the longest group; none where the data does not tell.

    Args:
        data: The data module, loaded.
        share: Micro-batches of an optimizer step, over all ranks.

    Returns:
        Of each the batches that are scored one after the other before the backward pass: one, or two of mixed data.
    """
    if isinstance(data, OnPolicyData):
        columns = data.examples(1).present.shape[1]
        size = data.minibatch // (data.completions * share)
        return [[drawn(data.groups, size, columns, data.sampling.max_new_tokens)]]
    if not isinstance(data, CompletionData):
        return []
    loader = CompletionData.train_dataloader(data)  # mixed data has the same pairs in a loader that needs a policy
    groups, batches = data.groups, loader.order.batches()
    chosen = [max(batches, key=lambda batch, by=by: by(groups[i].tokens for i in batch)) for by in (sum, max)]  # type: ignore[misc]
    beside = (
        [drawn(groups, data.samples // share, 1, data.sampling.max_new_tokens)] if isinstance(data, MixedData) else []
    )
    return [[loader.collate_fn([groups[i] for i in batch]), *beside] for batch in chosen]


def drawn(groups: Sequence[Group], size: int, columns: int, tokens: int) -> CompletionBatch:
    """The longest prompts with completions that fill their budget.

    Args:
        groups: The prompts.
        size: How many of them.
        columns: Completions of each.
        tokens: The budget.
    """
    full = torch.ones(tokens, dtype=torch.int32)
    longest = sorted(groups, key=lambda group: len(group.prompt_ids))[-max(1, size) :]
    return collate([group._replace(completion_ids=[full] * columns, rewards=None) for group in longest])


def groups_of(batch: CompletionBatch) -> list[CompletionBatch]:
    """Each group alone."""
    return [batch.rows(slice(number, number + 1)) for number in range(len(batch.row))]


def tokens_of(group: CompletionBatch) -> float:
    """Tokens of prompts and completions."""
    return float(group.prompt_mask.sum() + group.completion_mask.sum())


def program(device: torch.device) -> int:
    """Bytes the process will hold beside the run; 0 on a GPU."""
    if device.type != "cpu":
        return 0
    return LATER + (_status("VmRSS") or peak(device))


def free(device: torch.device) -> int:
    """Bytes the device has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    there = _kilobytes(meminfo.read_text(), "MemAvailable") if meminfo.is_file() else None
    return memory(device) if there is None else there


def peak(device: torch.device) -> int:
    """Most bytes of the run so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    found = _status("VmHWM")
    if found is not None:
        return found
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int | None:
    """A figure of this process in bytes, where the system tells; its own, not that of the one that started it."""
    status = Path("/proc/self/status")
    return _kilobytes(status.read_text(), name) if status.is_file() else None


def _kilobytes(text: str, name: str) -> int | None:
    """A line of such a file, in bytes; None where some kernel leaves it out."""
    found = re.search(rf"^{name}:\s*(\d+)", text, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
