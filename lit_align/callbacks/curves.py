"""Curves of a run as one picture, ``curves.png``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.callbacks.progress import logged
from lit_align.callbacks.run_folder import run_folder
from lit_align.errors import UserError

PANELS = {
    "rollout/reward": "reward of fresh completions",
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "accuracy",
    "beta": "β",
    "kl": "KL to the reference (nats)",
}
"""Logged name below ``train/`` and ``val/``, or of fresh completions -> title of its panel."""


class Curves(Callback):
    """Collects the logged values of loss, margin, accuracy, β and KL, and draws them when training ends or breaks off.

    What is not logged gets no panel. The points are in the checkpoint, so the picture of a resumed run is whole.
    """

    def __init__(self) -> None:
        self.points: dict[str, list[list[float]]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The points so far, logged name -> [step, value] pairs."""
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the points of a checkpoint."""
        self.points = state_dict["points"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Collect what the step at hand logged; the checkpoint holds these very lists."""
        self._collect_step(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collect what the step before logged; modules log at the very end of a step, after the callbacks."""
        self._collect_step(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect what the last step of the epoch logged."""
        self._collect_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the held-out values."""
        if not trainer.sanity_checking:
            self._collect(trainer, "val/")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves."""
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what there is after an interruption."""
        if isinstance(exception, KeyboardInterrupt | UserError):
            self._draw(trainer)

    def _collect_step(self, trainer: Trainer) -> None:
        if trainer.global_step and trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._collect(trainer, "train/")

    def _collect(self, trainer: Trainer, prefix: str) -> None:
        for name in PANELS:
            value = trainer.callback_metrics.get(logged(prefix, name))
            points = self.points.setdefault(prefix + name, [])
            if value is not None and (not points or points[-1][0] < trainer.global_step):
                points.append([trainer.global_step, float(value)])

    def _draw(self, trainer: Trainer) -> None:
        folder = run_folder(trainer)
        if folder is not None and trainer.is_global_zero and folder.is_dir():
            draw_curves(self.points, folder / "curves.png")


def draw_curves(points: dict[str, list[list[float]]], path: Path) -> bool:
    """Draw one panel for each quantity, training as a line and validation as dots.

    Args:
        points: Logged name, such as ``train/loss``, -> [step, value] pairs.
        path: The PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    titles = {name: title for name, title in PANELS.items() if points.get(f"train/{name}") or points.get(f"val/{name}")}
    if not titles:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(titles), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, title) in enumerate(titles.items(), start=1):
        axes = figure.add_subplot(1, len(titles), index)
        for prefix, style in (("train/", "-"), ("val/", "o")):
            if pairs := points.get(prefix + name):
                steps, values = zip(*pairs, strict=True)
                axes.plot(steps, values, style if len(pairs) > 1 else "o", label=prefix[:-1])
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return True
