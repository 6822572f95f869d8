"""The memory a run is going to take, said before the model is loaded, and what it took."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.batch import CompletionBatch
from lit_align.data.collate import collate
from lit_align.data.loader import ResumableLoader
from lit_align.data.on_policy import OnPolicyData
from lit_align.errors import UserError
from lit_align.planner import Estimate, Planner
from lit_align.settings import PairSettings

log = logging.getLogger(__name__)

UNKNOWN = (RuntimeError, NotImplementedError, TypeError, ValueError, KeyError, AttributeError)
"""What a model of an unusual architecture may raise when it is walked through without weights."""


class MemoryPlan(Callback):
    """Prints the expected peak and the largest micro-batch, and warns where the device does not hold it.

    On a CPU the peak is that of the process's resident memory, on a GPU that of ``torch.cuda.max_memory_allocated``.
    Drawing completions is not in it.
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
        device = trainer.strategy.root_device
        try:
            batches = heaviest(trainer.datamodule, trainer)  # type: ignore[attr-defined]
            self._plan(Planner(settings, device), batches, device, settings)
        except UserError:
            raise
        except UNKNOWN as error:
            log.info("the memory of this run cannot be told beforehand: %s", error)

    def _plan(
        self, planner: Planner, batches: Sequence[CompletionBatch], device: torch.device, settings: PairSettings
    ) -> None:
        if not batches:
            log.info("the memory of this run cannot be told beforehand: the data module does not say its batches")
            return
        estimate = max((planner.estimate(planner.load(batch)) for batch in batches), key=lambda one: one.total)
        longest = max((group for batch in batches for group in groups_of(batch)), key=tokens_of)
        own, room = program(device), free(device)
        largest = planner.largest(planner.load(longest), room, estimate)
        self.expected = own + estimate.total
        print(plan_line(estimate, own, room, largest, int(tokens_of(longest)), device), flush=True)
        if estimate.total > room:
            log.warning("%s", remedy(estimate, room, largest, settings))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what it was."""
        if self.expected is not None:
            found = peak(trainer.strategy.root_device)
            print(f"memory: the peak was {_size(found)}, {found / self.expected:.2f} of what was expected", flush=True)


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


def heaviest(data: Any, trainer: Trainer) -> list[CompletionBatch]:
    """The training micro-batches of most tokens and with the longest group; none where the data does not tell."""
    if isinstance(data, OnPolicyData):
        return [drawn(data, trainer.world_size * trainer.accumulate_grad_batches)]
    loader = data.train_dataloader() if data is not None else None
    if not isinstance(loader, ResumableLoader):
        return []
    groups: Any = loader.dataset
    lengths = [len(group.prompt_ids) + sum(map(len, group.completion_ids)) for group in groups]
    batches = loader.order.batches()
    chosen = [max(batches, key=lambda batch, by=by: by(lengths[i] for i in batch)) for by in (sum, max)]  # type: ignore[misc]
    return [loader.collate_fn([groups[i] for i in batch]) for batch in chosen]


def drawn(data: OnPolicyData, share: int) -> CompletionBatch:
    """The longest prompts with completions that fill their budget.

    Args:
        data: The data.
        share: Micro-batches of a minibatch, over all ranks.
    """
    size = max(1, data.minibatch // (data.completions * share))
    full = torch.ones(data.sampling.max_new_tokens, dtype=torch.int32)
    columns = data.examples(1).present.shape[1]
    longest = sorted(data.groups, key=lambda group: len(group.prompt_ids))[-size:]
    return collate([group._replace(completion_ids=[full] * columns, rewards=None) for group in longest])


def groups_of(batch: CompletionBatch) -> list[CompletionBatch]:
    """Each group alone."""
    return [batch.rows(slice(number, number + 1)) for number in range(len(batch.row))]


def tokens_of(group: CompletionBatch) -> float:
    """Tokens of prompts and completions."""
    return float(group.prompt_mask.sum() + group.completion_mask.sum())


def program(device: torch.device) -> int:
    """Bytes the process holds beside the run; 0 on a GPU."""
    if device.type != "cpu":
        return 0
    return _status("VmRSS") or peak(device)


def free(device: torch.device) -> int:
    """Bytes the device has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        return _kilobytes(meminfo.read_text(), "MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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


def _kilobytes(text: str, name: str) -> int:
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
