"""When checkpoints are made, what of each rank they hold, and how a run stops right after one."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lit_align.callbacks.run_folder import run_folder
from lit_align.checkpoint import ENDED, LAST, advance, mark_ended, sweep
from lit_align.errors import Stopped
from lit_align.randomness import random_states, set_random_states
from lit_align.settings import check
from lit_align.statefile import PART

METRICS = "metrics"
"""Key of a checkpoint under which the last value of each logged metric stands."""
RANKS = "ranks"
"""Key of a checkpoint under which each rank's random states and sums of metrics stand."""


class Checkpoints(Checkpoint):
    """Keeps the newest state of a run in ``checkpoints/last.ckpt``, and the one before it in ``previous.ckpt``.

    A checkpoint is made between two optimizer steps only: at the end of each epoch, and within it whenever enough steps
    or minutes have passed; after a validation that is due at that step, so that it is not owed. The one at the end of
    the run takes its place when all else is done: a run that dies on its last metres goes on from the one before.

    Each holds the random states of every rank, which are put back when training starts, and the last value of each
    metric, for those who ask for it when it has not come round again.

    Args:
        every_n_steps: Optimizer steps between two checkpoints, >= 1; None goes by the clock alone.
        every_n_minutes: Minutes between two checkpoints, > 0; None goes by steps alone.
    """

    def __init__(self, every_n_steps: int | None = None, every_n_minutes: float | None = 5.0) -> None:
        if every_n_steps is not None:
            check("checkpoints.every_n_steps", every_n_steps, every_n_steps >= 1, "1 or more, or null", "50")
        if every_n_minutes is not None:
            check("checkpoints.every_n_minutes", every_n_minutes, every_n_minutes > 0, "greater than 0, or null", "5")
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.stop_by: int | None = None
        self._ending = self._ended = self._owed = False
        self._seen = self._saved = 0
        self._clock = 0.0
        self._ranks: list[dict[str, Any]] = []
        self._metrics: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear away what a killed run left half-written."""
        if trainer.is_global_zero:
            sweep(folder(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting, and put the random states of the checkpoint back, after all that draws before training."""
        self._seen = self._saved = trainer.global_step
        self._ended = False
        self._clock = time.monotonic()
        self.stop_by = None
        trainer.callback_metrics.update(self._metrics)
        if self._ranks:
            self._restore(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two optimizer steps, if it is time, or see to it that it is done after the validation.

        Also at the end of an epoch: Lightning does not resume exactly from what is saved in ``on_train_epoch_end`` of a
        run that ``max_steps`` ends.
        """
        if trainer.global_step == self._seen:  # amid an accumulated step
            return
        self._seen = trainer.global_step
        if not self._due(trainer):
            return
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        self._owed = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if self._owed:  # by the settings; there may be nothing to validate on
            validation = loop.epoch_loop.val_loop
            validation.setup_data()
            self._owed = not validation.skip
        if not self._owed:
            self._save(trainer)
        elif self.stop_by is not None:
            self.save(trainer)  # in case the validation is not waited for

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was put off until the validation was done, and where its outcome ends the run."""
        if trainer.sanity_checking:
            return
        due = self._at_end(trainer) and self._saved != trainer.global_step and not self._ended
        if self._owed or (due and not trainer.fit_loop.epoch_loop._should_accumulate()):
            self._owed = False
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the state of the end the newest: adapter, card and curves are written by now."""
        place = folder(trainer)
        fresh = place / f".end{PART}"
        if not trainer.is_global_zero:
            return
        if not self._ended:  # a callback stopped the run after its last checkpoint was made
            mark_ended(place / LAST, trainer.global_step, fresh)
        if fresh.exists():
            advance(fresh, place, keep_previous=self._ended)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what differs between ranks, random states and the sums of the metrics at hand, and their last values."""
        monitor = getattr(pl_module, "monitor", None)
        own = {"random": random_states(pl_module.device), "monitor": monitor.state_dict() if monitor else {}}
        ranks: list[Any] = [own]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, own)
        checkpoint[RANKS] = ranks
        checkpoint[METRICS] = {name: value.cpu() for name, value in trainer.callback_metrics.items()}
        checkpoint[ENDED] = self._ending

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take what ``on_train_start`` puts back."""
        self._ranks, self._metrics = checkpoint.get(RANKS, []), checkpoint.get(METRICS, {})

    def save(self, trainer: Trainer) -> None:
        """Make the present state the newest checkpoint; called on all ranks, between two optimizer steps."""
        place = folder(trainer)
        fresh = place / f".next{PART}"
        trainer.save_checkpoint(fresh)
        if trainer.is_global_zero and fresh.exists():  # it does not where the disk refused it
            advance(fresh, place, keep_previous=self._saved != trainer.global_step)
        self._saved = trainer.global_step
        self._clock = time.monotonic()

    def _save(self, trainer: Trainer) -> None:
        """Save, and stop if that was asked for; the state of the end goes beside until the end is reached."""
        if self._at_end(trainer):
            self._ending = self._ended = True
            trainer.save_checkpoint(folder(trainer) / f".end{PART}")
            self._ending = False
            return
        self.save(trainer)
        if self.stop_by is not None:
            raise Stopped(self.stop_by)

    def _due(self, trainer: Trainer) -> bool:
        by_step = self.every_n_steps is not None and trainer.global_step - self._saved >= self.every_n_steps
        epoch_ends = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if by_step or epoch_ends or self.stop_by is not None or self._at_end(trainer):
            return True
        if self.every_n_minutes is None:
            return False
        late = time.monotonic() - self._clock >= 60 * self.every_n_minutes
        return trainer.strategy.reduce_boolean_decision(late, all=False)

    def _at_end(self, trainer: Trainer) -> bool:
        """Whether no further step will be taken."""
        loop = trainer.fit_loop
        last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
        whole = last_epoch and loop.epoch_loop._num_ready_batches_reached()
        stops = trainer.should_stop and loop._can_stop_early  # not before min_steps and min_epochs
        return stops or 0 < trainer.max_steps <= trainer.global_step or whole

    def _restore(self, trainer: Trainer, module: LightningModule) -> None:
        ranks, self._ranks = self._ranks, []
        if len(ranks) != trainer.world_size:
            warnings.warn(
                f"the checkpoint is of {len(ranks)} ranks and this run has {trainer.world_size}: random draws, such as "
                "sampled completions, will differ from those of the run it comes from",
                stacklevel=2,
            )
            return
        own = ranks[trainer.global_rank]
        if own["monitor"]:
            module.monitor.load_state_dict({k: v.to(module.device) for k, v in own["monitor"].items()})  # type: ignore[union-attr]
        set_random_states(own["random"], module.device)


def folder(trainer: Trainer) -> Path:
    """Where the checkpoints of a trainer's run are."""
    return (run_folder(trainer) or Path(trainer.default_root_dir)) / "checkpoints"
