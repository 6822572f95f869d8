"""Signals: the first asks for an orderly end between two optimizer steps, a second Ctrl-C ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.callbacks.checkpoints import Checkpoints
from lit_align.errors import Stopped

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK") if hasattr(signal, name))
"""Ctrl-C; what ``kill``, a service manager and Slurm send; what Slurm is often told to send before its time limit."""


class Signals(Callback):
    """Turns a signal into a checkpoint after the optimizer step at hand, and a ``Stopped`` that ends the run.

    The ranks agree after every optimizer step, so that it is enough for one of them to get the signal. While handlers
    are ours, Lightning's own, which save nothing or save amid a step, are not in place. A signal during the last step
    changes nothing: the run ends as it would have.
    """

    def __init__(self) -> None:
        self._caught: int | None = None
        self._before: dict[int, Any] = {}
        self._seen = 0
        self._says = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the handlers in place of Lightning's, and stop if those were asked to while all was made ready.

        Raises:
            Stopped: If a SIGTERM came before the first step, as during the first samples.
        """
        if trainer.strategy.reduce_boolean_decision(trainer.received_sigterm, all=False):
            raise Stopped(signal.SIGTERM)
        self._seen = trainer.global_step
        self._says = trainer.is_global_zero
        self._caught = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: stop if any rank was asked to.

        Raises:
            Stopped: In a run without checkpoints; otherwise these raise it when they have saved.
        """
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(self._caught is not None, all=False):
            return
        number = self._caught or signal.SIGTERM
        keepers = [callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)]  # type: ignore[attr-defined]
        if not keepers:
            raise Stopped(number)
        keepers[0].stop_by = number

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No further step will come: signals do again what they did before."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Signals do again what they did before; ranks that stop together need nobody to end them."""
        self._restore()
        started = getattr(trainer.strategy.launcher, "procs", None)
        if isinstance(exception, Stopped) and started:
            started.clear()  # Lightning would kill them, notice their death, and kill this process for it

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._caught = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._says:  # no print: the signal may have come in the middle of one
            text = f"\n{signal.Signals(number).name}: saving after this optimizer step; Ctrl-C ends at once\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
