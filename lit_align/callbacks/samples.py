"""Samples: what the policy writes for fixed held-out prompts, before and after training, and what it is worth."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lit_align.batch import Sampling
from lit_align.callbacks.draws import Draw, draw, judged, mean_and_error, undisturbed
from lit_align.callbacks.run_folder import SAMPLES, run_folder


class SampleTable(Callback):
    """Samples before training (from the reference), after it (from the policy), and in between if asked.

    Writes ``samples.jsonl``, one completion a line, and ``samples.json``, the summaries; prints a few prompts side by
    side. Random states and the modules' train or eval modes are left as they were. A module that writes no text, such
    as one that learns to judge it, is not sampled.

    Args:
        prompts: Held-out prompts, distinct; 0 turns sampling off.
        show: How many of them the printed table shows.
        completions: Completions of each prompt, >= 1.
        max_new_tokens: Token budget of a completion, >= 1.
        every_n_steps: Optimizer steps between draws during training; 0 draws at start and end only.
        seed: Seed of the draws; the same at each, so that their noise is common.
    """

    def __init__(
        self,
        prompts: int = 64,
        show: int = 4,
        completions: int = 1,
        max_new_tokens: int = 64,
        every_n_steps: int = 0,
        seed: int = 0,
    ) -> None:
        self.prompts = prompts
        self.show = show
        self.completions = completions
        self.max_new_tokens = max_new_tokens
        self.every_n_steps = every_n_steps
        self.seed = seed
        self.before: Draw | None = None
        self.summaries: list[dict[str, Any]] = []
        self._last = -1

    def state_dict(self) -> dict[str, Any]:
        """What was drawn, so that a resumed run compares with the same beginning."""
        before = None if self.before is None else dataclasses.asdict(self.before)
        return {"before": before, "summaries": self.summaries, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the draws of a checkpoint."""
        self.before = None if state_dict["before"] is None else Draw(**state_dict["before"])
        self.summaries, self._last = state_dict["summaries"], state_dict["last"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw from the reference, unless a checkpoint holds what was drawn."""
        if self.prompts > 0 and pl_module.generates and self.before is None:
            self._last = trainer.global_step
            self.before = self._take(trainer, pl_module, reference=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw from the policy every ``every_n_steps`` steps."""
        step = trainer.global_step
        if (
            self.prompts
            and self.before is not None
            and self.every_n_steps > 0
            and step > self._last
            and step % self.every_n_steps == 0
        ):
            self._last = step
            self._take(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw from the trained policy and show it beside the reference."""
        if self.prompts and self.before is not None:
            after = self._take(trainer, pl_module)
            # A run that was gone on with may ask for other prompts or numbers of completions than it began with.
            alike = (after.prompts, after.tokens.shape) == (self.before.prompts, self.before.tokens.shape)
            if trainer.is_global_zero and alike:
                rich.get_console().print(comparison(self.before, after, self.show))
                print(headline(self.before, after), flush=True)

    def _take(self, trainer: Trainer, module: LightningModule, reference: bool = False) -> Draw:
        data = trainer.datamodule  # type: ignore[attr-defined]
        sampling = Sampling(max_new_tokens=self.max_new_tokens, seed=self.seed)
        with undisturbed(module):
            batch = data.prompts(self.prompts).to(module.device)
            drawn = draw(module, batch, self.completions, sampling, reference)
        drawn.step = 0 if reference else trainer.global_step
        drawn.reward = judged(getattr(data, "oracle", None), drawn, module.tokenizer)
        self.summaries.append(drawn.summary())
        folder = run_folder(trainer)
        if folder is not None and trainer.is_global_zero:
            self._write(folder, drawn)
        return drawn

    def _write(self, folder: Path, drawn: Draw) -> None:
        with (folder / SAMPLES).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in drawn.rows())
        text = json.dumps({"seed": self.seed, "max_new_tokens": self.max_new_tokens, "draws": self.summaries}, indent=2)
        (folder / "samples.json").write_text(text + "\n", encoding="utf-8")


def comparison(before: Draw, after: Draw, show: int) -> Table:
    """A table of the first prompts with their first completion before and after training."""
    table = Table(title=f"held-out prompts, before training and after {after.step} steps", show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column, overflow="fold")
    for i in range(min(show, len(before.prompts))):
        cells = [_cell(drawn.completions[i][0], drawn.reward, i) for drawn in (before, after)]
        table.add_row(escape(_short(before.prompts[i])), *cells)
    return table


def _cell(text: str, reward: Tensor | None, i: int) -> str:
    return escape(_short(text)) + ("" if reward is None else f"\nreward {float(reward[i, 0]):+.2f}")


def _short(text: str, limit: int = 400) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit].rstrip() + " …"


def headline(before: Draw, after: Draw) -> str:
    """The summaries in a line or two; the gain's standard error is that of the differences prompt by prompt."""
    parts: list[str] = []
    if before.reward is not None and after.reward is not None:
        gain = mean_and_error(after.reward - before.reward)
        texts = [plus_minus(mean_and_error(values)) for values in (before.reward, after.reward)]
        parts.append(f"reward {texts[0]} -> {texts[1]}, gain {plus_minus(gain)}")
    if after.kl is not None:
        parts.append(f"KL(policy || reference) {plus_minus(mean_and_error(after.kl))} nats")
    parts.append(f"ended {before.ended.double().mean():.0%} -> {after.ended.double().mean():.0%}")
    parts.append(f"length {before.tokens.double().mean():.1f} -> {after.tokens.double().mean():.1f} tokens")
    return f"samples on {len(after.prompts)} prompts: " + "; ".join(parts)


def plus_minus(value: dict[str, float | None], digits: int = 3) -> str:
    """``mean ± standard error``."""
    error = value["standard_error"]
    text = f"{value['mean']:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"
