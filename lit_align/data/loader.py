"""The order of the data, a pure function of (seed, epoch, rank), and the loaders that follow it and resume."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from lit_align.batch import CompletionBatch
from lit_align.data.collate import Group
from lit_align.data.rows import DataError

Collate = Callable[[Sequence[Group]], CompletionBatch]


def training_batches(count: int, batch_size: int, world_size: int) -> int:
    """Micro-batches per epoch, the same on every rank.

    Args:
        count: Groups, >= ``world_size``.
        batch_size: Groups of a micro-batch on one rank, >= 1.
        world_size: Ranks, >= 1.
    """
    whole, rest = divmod(count, batch_size * world_size)
    return whole + (rest >= world_size)


class TrainingOrder(Sampler[list[int]]):
    """Batches of one rank, shuffled anew each epoch.

    The groups are permuted by (seed, epoch) and cut into global batches of ``batch_size * world_size``; rank r takes
    every ``world_size``-th group of each, from the r-th on. So the global batches depend only on the product of the
    two, and no group comes twice in an epoch. The last global batch is smaller, the ranks' parts of it differ by at
    most one group; if it does not hold a group for every rank, those fewer than ``world_size`` groups sit out the
    epoch.

    With ``window`` W > 1 the groups of each W whole global batches in a row are sorted by length before they are cut,
    and the W batches shuffled. Groups of a batch are then of similar length, and so are the ranks' parts of it. Each
    window holds the groups it would hold unsorted, and the last, smaller batch is never sorted, so that it holds no
    longer groups than others.

    Attributes:
        epoch: Set by ``set_epoch``; the same epoch gives the same order whatever came before.
        position: Batches of the epoch that are done; iteration begins after them, the length stays that of the epoch.

    Args:
        count: Groups.
        batch_size: Groups of a micro-batch on one rank, >= 1.
        seed: Any integer.
        rank: This process, in [0, world_size).
        world_size: Processes.
        shuffle: False keeps the order of the source in every epoch, for overfitting on purpose.
        lengths: Tokens of each group; read only where ``window`` is not 1.
        window: Global batches that are sorted by length together, >= 1; 1 leaves the batches to chance.

    Raises:
        DataError: If there are fewer groups than ranks.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        lengths: Sequence[int] = (),
        window: int = 1,
    ) -> None:
        if count < world_size:
            raise DataError(
                f"{count} training groups for {world_size} ranks: every rank needs one; use at most {count} devices "
                "or more data"
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.lengths, self.window = lengths, window
        self.epoch = self.position = 0

    @property
    def sampler(self) -> TrainingOrder:
        """Itself: Lightning looks for ``set_epoch`` on ``batch_sampler.sampler`` only."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Move to the start of another epoch; no change if it is this one. Called by Lightning before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def permutation(self) -> list[int]:
        """The order of all groups in this epoch before any sorting, the same on every rank."""
        if not self.shuffle:
            return list(range(self.count))
        return torch.randperm(self.count, generator=self._generator("")).tolist()

    def batches(self) -> list[list[int]]:
        """All batches of this rank in this epoch."""
        order, step = self.permutation(), self.batch_size * self.world_size
        if self.shuffle and self.window > 1:
            order = self._sorted_in_windows(order, step)
        starts = range(0, len(self) * step, step)
        return [order[start : start + step][self.rank :: self.world_size] for start in starts]

    def _sorted_in_windows(self, order: list[int], step: int) -> list[int]:
        """The order with the groups of each window in batches of similar length; what fills no batch stays last."""
        generator, whole, found = self._generator(" windows"), len(order) // step * step, []
        for start in range(0, whole, self.window * step):
            window = sorted(order[start : min(start + self.window * step, whole)], key=lambda i: self.lengths[i])
            for batch in torch.randperm(len(window) // step, generator=generator).tolist():
                found += window[batch * step : (batch + 1) * step]
        return found + order[whole:]

    def _generator(self, purpose: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {self.epoch}{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches()[self.position :])

    def __len__(self) -> int:
        return training_batches(self.count, self.batch_size, self.world_size)


class ValidationOrder(Sampler[list[int]]):
    """Batches of one rank that together with the other ranks' hold every group exactly once, equally many on each rank.

    Rank r takes the groups r, r + world_size, and so on, in the order of the source, cut into equally many batches that
    differ by at most one group. Nothing is padded or repeated, so a mean weighted by groups is the mean of the data.
    With ``batch_size`` 1 and a count that the ranks do not divide, a batch may hold 2 groups, since a batch cannot be
    empty.

    Args:
        count: Groups.
        batch_size: Most groups of a batch, >= 1.
        rank: This process, in [0, world_size).
        world_size: Processes.

    Raises:
        DataError: If there are fewer groups than ranks.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if count < world_size:
            raise DataError(
                f"{count} validation groups for {world_size} ranks: every rank needs one; use at most {count} devices, "
                "or a larger validation_size"
            )
        self.rows = list(range(rank, count, world_size))
        most, least = -(-count // world_size), count // world_size
        self.number = min(-(-most // batch_size), least)

    def __iter__(self) -> Iterator[list[int]]:
        size, larger = divmod(len(self.rows), self.number)
        start = 0
        for number in range(self.number):
            end = start + size + (number < larger)
            yield self.rows[start:end]
            start = end

    def __len__(self) -> int:
        return self.number


class ResumableLoader(DataLoader[CompletionBatch]):
    """Training batches in a ``TrainingOrder``, with a position that is saved in checkpoints.

    Lightning 2.6 stores ``state_dict`` with the fit loop, of rank 0 for all ranks, and loads it before it makes the
    iterator; its ``set_epoch`` comes after that. So iteration reads epoch and position only when the first batch is
    asked for. The length stays that of the whole epoch, since Lightning counts the batches already seen itself. The
    position counts batches handed out, not those that workers have fetched ahead.

    Args:
        groups: The data.
        order: Which groups make a batch.
        collate: Makes the batch.
        num_workers: Processes that collate, 0 for none.
    """

    def __init__(self, groups: Sequence[Group], order: TrainingOrder, collate: Collate, num_workers: int = 0) -> None:
        # A generator of its own: the iterator draws a seed at each start, and the global stream must not depend on it.
        super().__init__(
            groups,  # type: ignore[arg-type]
            batch_sampler=order,
            collate_fn=collate,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(order.seed % 2**63),
        )
        self.order = order
        self.fingerprint = _fingerprint(groups)

    def __iter__(self) -> Iterator[CompletionBatch]:  # type: ignore[override]
        order = self.order
        if order.position >= len(order):  # a new pass without set_epoch repeats the epoch
            order.position = 0
        for batch in super().__iter__():
            order.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, the same on every rank, and what that is only valid for."""
        return {"epoch": self.order.epoch, "position": self.order.position, "for": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which the state was saved.

        Raises:
            DataError: If the state is from the middle of an epoch and the data or its order have changed since.
        """
        saved, current = state["for"], self._identity()
        changed = [
            f"{name} was {saved.get(name)}, is {value}" for name, value in current.items() if saved.get(name) != value
        ]
        if changed and 0 < state["position"] < saved["batches"]:
            raise DataError(
                f"cannot resume after batch {state['position']} of {saved['batches']}: {'; '.join(changed)}. "
                "Set these back, or resume from a checkpoint of the end of an epoch"
            )
        self.order.set_epoch(state["epoch"])
        self.order.position = len(self.order) if state["position"] >= saved["batches"] else state["position"]

    def _identity(self) -> dict[str, Any]:
        order = self.order
        values = {"batches": len(self), "global batch size": order.batch_size * order.world_size, "seed": order.seed}
        values |= {"shuffle": order.shuffle, "length_window": order.window}
        return {**values, "data (hash of rows and lengths)": self.fingerprint}


def validation_loader(groups: Sequence[Group], order: ValidationOrder, collate: Collate) -> DataLoader[CompletionBatch]:
    """Validation batches, always in the same order; no draw from the global random stream."""
    return DataLoader(
        groups,  # type: ignore[arg-type]
        batch_sampler=order,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(0),
    )


def _fingerprint(groups: Sequence[Group]) -> str:
    """A short hash of every group's row and lengths, which changes with the data, the tokenizer or a length limit."""
    numbers = [n for group in groups for n in (group.row, len(group.prompt_ids), *map(len, group.completion_ids))]
    return hashlib.sha256(repr(numbers).encode()).hexdigest()[:12]
