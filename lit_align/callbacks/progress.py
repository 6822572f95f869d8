"""Progress: a Rich bar on a terminal, one plain line every few steps elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

SHOWN = {
    "rollout/reward": ("reward", "{:.3f}"),
    "loss": ("loss", "{:.4f}"),
    "rewards/margins": ("margin", "{:.3f}"),
    "rewards/accuracies": ("accuracy", "{:.2f}"),
    "beta": ("beta", "{:.4g}"),
    "kl": ("kl", "{:.3g}"),
    "kl_samples": ("kl of samples", "{:.3g}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "padding": ("padding", "{:.0%}"),
}
"""Logged name below ``train/`` or ``val/``, or of fresh completions -> what the user reads, and its format."""


class Progress(RichProgressBar):
    """Step, loss, margin, accuracy, β, KL, tokens a second and padding, as far as the objective logs them.

    A step is reported when the next one starts, because modules log at the very end of theirs.

    Args:
        every: Optimizer steps between two plain lines, >= 1, where the output is no terminal; rounded up to a multiple
            of the trainer's ``log_every_n_steps``, since only then there is something new to say.
    """

    def __init__(self, every: int = 10) -> None:
        super().__init__(refresh_rate=10)
        self.every = max(1, every)
        self.plain = not Console().is_terminal
        if self.plain:
            self.disable()
        self._quiet = False
        self._begin = (0, 0.0)
        self._printed = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the first rank alone write."""
        super().setup(trainer, pl_module, stage)
        self._quiet = not trainer.is_global_zero

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar."""
        held_out = shown(trainer.callback_metrics, "val/")
        beside = {f"val {label}": held_out[label] for label in ("loss", "accuracy") if label in held_out}
        return {"step": _of_total(trainer), **shown(trainer.callback_metrics, "train/"), **beside}

    def _get_train_description(self, current_epoch: int) -> str:
        """The epoch, and of how many where their number is set; a run may be bounded by steps or time instead."""
        epochs = self.trainer.max_epochs
        return f"Epoch {current_epoch}" + (f"/{epochs - 1}" if epochs is not None and epochs > 0 else "")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._begin = (trainer.global_step, time.perf_counter())
        self._printed = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Report the step before."""
        self._report(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the last step of the epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._report(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar down, so that what other callbacks say at the end stands below it."""
        super().on_train_end(trainer, pl_module)
        self._stop_progress()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the held-out metrics in a line of their own."""
        super().on_validation_end(trainer, pl_module)
        values = shown(trainer.callback_metrics, "val/")
        if self.plain and values and trainer.state.fn == "fit" and not trainer.sanity_checking and not self._quiet:
            print("  ".join([f"validation after step {trainer.global_step}", *_words(values)]), flush=True)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.plain:
            self._update_metrics(trainer, pl_module)
        elif trainer.global_step != self._printed and self._due(trainer) and not self._quiet:
            self._printed = trainer.global_step
            print(self._line(trainer), flush=True)

    def _due(self, trainer: Trainer) -> bool:
        interval = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        every = math.ceil(self.every / interval) * interval
        last = trainer.global_step == total_steps(trainer) and trainer.global_step % interval == 0
        return trainer.global_step % every == 0 or last

    def _line(self, trainer: Trainer) -> str:
        parts = [f"step {_of_total(trainer)}", *_words(shown(trainer.callback_metrics, "train/"))]
        total = total_steps(trainer)
        done = trainer.global_step - self._begin[0]
        if total is not None and done:
            left = (time.perf_counter() - self._begin[1]) / done * (total - trainer.global_step)
            parts.append(f"ETA {duration(left)}")
        return "  ".join(parts)


def shown(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The values a user watches, formatted; one that is not logged is left out.

    Args:
        metrics: Logged name -> value.
        prefix: ``train/`` or ``val/``.
    """
    found = {label: (metrics.get(logged(prefix, name)), style) for name, (label, style) in SHOWN.items()}
    return {label: style.format(float(value)) for label, (value, style) in found.items() if value is not None}


def logged(prefix: str, name: str) -> str:
    """The name under which a quantity is logged; those of fresh completions belong to training alone."""
    return name if prefix == "train/" and name.startswith("rollout/") else prefix + name


def _words(values: dict[str, Any]) -> list[str]:
    return [f"{value} {label}" if label == "tokens/s" else f"{label} {value}" for label, value in values.items()]


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, or None if it has no fixed end."""
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(batches):
        limits.append(math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs)
    return min(limits) if limits else None


def _of_total(trainer: Trainer) -> str:
    total = total_steps(trainer)
    return f"{trainer.global_step}" if total is None else f"{trainer.global_step}/{total}"


def duration(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
