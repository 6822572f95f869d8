"""The end of a run: the adapter with its tokenizer and model card, and how to load them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.adapters import held_base
from lit_align.callbacks.progress import total_steps
from lit_align.callbacks.run_folder import run_folder
from lit_align.callbacks.samples import SampleTable
from lit_align.card import CardFacts, loading_code, render_card
from lit_align.errors import UserError


class SaveAdapter(Callback):
    """Writes ``adapter/`` (peft's format, with the tokenizer) and ``README.md`` when training ends or is interrupted.

    Put it last, so that the card has the samples drawn after training.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and tell the user where."""
        self._save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what there is when the user stops a run that has begun, or it cannot go on, as without its reward."""
        if isinstance(exception, KeyboardInterrupt | UserError) and trainer.global_step > 0:
            self._save(trainer, pl_module, interrupted=True)

    def _save(self, trainer: Trainer, pl_module: LightningModule, interrupted: bool = False) -> None:
        folder = run_folder(trainer)
        if folder is None or not folder.is_dir() or not trainer.is_global_zero:
            return
        adapter = folder / "adapter"
        pl_module.save(adapter)  # type: ignore[operator]
        pl_module.tokenizer.save_pretrained(str(adapter))  # type: ignore[union-attr,operator]
        facts = gather(trainer, pl_module, folder, interrupted)
        for place in (folder, adapter):  # peft leaves a template in the adapter's folder
            (place / "README.md").write_text(render_card(facts), encoding="utf-8")
        if interrupted:
            print(f"interrupted after step {facts.steps}; what was learned until then is kept")
        print(closing_lines(facts.base_model, folder, facts.loading), flush=True)


def gather(trainer: Trainer, module: LightningModule, folder: Path, interrupted: bool) -> CardFacts:
    """Collect what the model card says from a trainer whose run ends."""
    settings = module.pair_settings
    config = folder / "config.yaml"
    report = getattr(trainer.datamodule, "report", None)  # type: ignore[attr-defined]
    samples = next((c.summaries for c in trainer.callbacks if isinstance(c, SampleTable)), [])  # type: ignore[attr-defined]
    described = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if described and trainer.optimizers:  # what stands in the configuration may be null, and is then chosen by size
        peak = trainer.optimizers[0].param_groups[0].get("initial_lr")
        described["model"].setdefault("init_args", {}).setdefault("optim", {})["learning_rate"] = peak
    return CardFacts(
        base_model=str(settings.model),  # type: ignore[union-attr]
        objective=type(module).__name__,
        summary=next(iter((type(module).__doc__ or "").strip().splitlines()), ""),
        config=described,
        report="" if report is None else report.render(),
        metrics={name: float(value) for name, value in trainer.callback_metrics.items()},
        samples=samples,
        steps=trainer.global_step,
        planned_steps=total_steps(trainer),
        interrupted=interrupted,
        generates=bool(module.generates),
        loading=module.loading,  # type: ignore[arg-type]
        held=held_base(folder / "adapter"),
    )


def closing_lines(model: str, folder: Path, loading: Sequence[str] = ()) -> str:
    """Where the results are, and a few lines of Python that load them.

    Args:
        model: Base model, as the user named it.
        folder: The run folder.
        loading: The objective's own lines, with ``{folder}`` for the adapter's folder; none for a plain adapter.
    """
    found = {"adapter": "adapter", "model card": "README.md", "curves": "curves.png", "samples": "samples.jsonl"}
    lines = [f"  {name:<12}{folder / file}" for name, file in found.items() if (folder / file).exists()]
    adapter = folder / "adapter"
    code = "\n".join(f"  {line}" for line in loading_code(model, str(adapter), loading, held_base(adapter)))
    return "\n".join(["saved", *lines, "load it with" if loading else "load the adapter with", code])
