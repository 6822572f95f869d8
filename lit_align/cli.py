"""The command line: LightningCLI with the product's defaults, its run folder and its callbacks."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lit_align.callbacks.adapter import SaveAdapter
from lit_align.callbacks.checkpoints import Checkpoints
from lit_align.callbacks.curves import Curves
from lit_align.callbacks.memory import MemoryPlan
from lit_align.callbacks.progress import Progress
from lit_align.callbacks.run_folder import RunFolder, run_folder
from lit_align.callbacks.samples import SampleTable
from lit_align.callbacks.signals import Signals
from lit_align.callbacks.validation import validation_table
from lit_align.checkpoint import LAST, SafeCheckpointIO
from lit_align.checks import check_checkpoint_path, usable_accelerator
from lit_align.errors import Stopped, UserError
from lit_align.mistakes import class_named
from lit_align.module import AlignModule
from lit_align.orphans import end_with_parent
from lit_align.parser import AlignParser, classes_first, own_rules, register
from lit_align.places import remember_folder
from lit_align.quiet import quiet_warnings
from lit_align.resume import RUNS, NothingLeft, Resumption, newest_state, resumption, spelled_out

TRAINER_DEFAULTS = {
    "accelerator": "auto",
    "devices": 1,
    "use_distributed_sampler": False,  # the data module strides the ranks itself, without padding
    "log_every_n_steps": 5,
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
SEED = 0


def run(args: Sequence[str]) -> None:
    """Parse the arguments and run the subcommand they begin with.

    Args:
        args: Arguments without the program's name.

    Raises:
        UserError: For what the user can put right.
        KeyboardInterrupt: After an orderly end on Ctrl-C.
    """
    quiet_warnings()
    end_with_parent()
    remember_folder()
    register()
    try:
        with own_rules():
            AlignCLI(args)
    except NothingLeft as end:
        rank_zero_print(str(end))


class AlignCLI(LightningCLI):
    """``fit`` and ``validate`` of any objective on any data module.

    Args:
        args: Arguments without the program's name.
    """

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            AlignModule,
            LightningDataModule,
            save_config_callback=None,  # RunFolder writes it
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=SEED,
            parser_class=AlignParser,
            parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False, "prog": "python -m lit_align"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands that exist, and the arguments of the trainer's methods that the parser must not offer."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder and the callbacks that take settings."""
        parser.add_lightning_class_args(Progress, "progress")
        # ``validate`` writes and samples nothing, but takes the config.yaml of a run as it is.
        text = "Folder for everything the run writes. (default: runs/OBJECTIVE/TIME)"
        parser.add_argument("--run_dir", type=str | None, default=None, help=text)
        text = "Go on with a run: its folder, or without a value the newest run of the objective, if there is one."
        parser.add_argument("--resume", type=str | None, default=None, help=text)
        parser.add_lightning_class_args(SampleTable, "samples")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and fill in what depends on other settings."""
        self.resumption: Resumption | None = None
        self.config = parser.parse_args(classes_first(spelled_out(args)))
        settings = self.config[self.config.subcommand]
        trainer = settings.trainer
        if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
            trainer.max_epochs = 1
        trainer.accelerator = usable_accelerator(trainer.accelerator)
        check_checkpoint_path(settings.ckpt_path)
        if settings.resume and self.config.subcommand == "fit":
            self._resume(settings)
        elif settings.resume:
            if settings.ckpt_path:
                raise UserError(
                    f"--resume {settings.resume} and --ckpt_path {settings.ckpt_path}: leave one of them out"
                )
            settings.ckpt_path = str(newest_state(settings.resume, settings.run_dir, runs_of(settings)))

    def _resume(self, settings: Any) -> None:
        """Let the settings go on with a run.

        Raises:
            NothingLeft: If no step of it is left to take.
        """
        place = runs_of(settings)
        self.resumption = found = resumption(settings.resume, settings.run_dir, place, self._dumped(settings))
        if found is None:
            rank_zero_print(f"--resume: there is no run in {settings.run_dir or place} yet, so one begins")
            return
        if found.done:
            raise NothingLeft(f"nothing to do for {found.folder}: {found.done}")
        settings.run_dir = str(found.folder)
        if found.found is not None:
            settings.ckpt_path = str(found.found.path)
        for key, (was, now) in sorted(found.changes.items()):
            rank_zero_print(f"{key}: {was!r} in the run until now, {now!r} from here on")

    def _dumped(self, settings: Any) -> str:
        """The settings as YAML that can be given to ``--config`` again, without what belongs to this one start."""
        saved = settings.clone()
        saved.run_dir = saved.resume = None
        if self.resumption is not None:
            saved.ckpt_path = None
        text: str = self._parser(self.config.subcommand).dump(saved, skip_unset=False)
        return text

    def _parse_ckpt_path(self) -> None:
        """Leave the model's configuration to the user; Lightning would take it from the checkpoint, without a word."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the run folder and the product's callbacks."""
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        given = config["callbacks"] or []
        users = given if isinstance(given, list) else [given]
        own: list[Callback] = []
        if config["enable_progress_bar"] is not False and not any(
            isinstance(callback, ProgressBar) for callback in users
        ):
            own.append(self._get(self.config_init, "progress"))
        logs = config["logger"] is not False
        if config["logger"] in (None, True):
            config["logger"] = False  # RunFolder attaches ours when training starts
        if self.subcommand != "fit" or config["fast_dev_run"]:
            config["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in users)
            return self._checked_trainer(config | {"callbacks": users + own})
        folder = self._run_folder(logs)
        own += [MemoryPlan(), self._get(self.config_init, "samples"), Curves(), SaveAdapter(), Signals()]
        if config["enable_checkpointing"] is not False:
            own.append(self._get(self.config_init, "checkpoints"))
        return self._checked_trainer(config | {"callbacks": [folder, *users, *own], "default_root_dir": folder.path})

    def _checked_trainer(self, config: dict[str, Any]) -> Trainer:
        plugins = config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, SafeCheckpointIO()]
        try:
            return self.trainer_class(**config)
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise UserError(f"Lightning refuses the settings under trainer: {error}") from error

    def _run_folder(self, loggers: bool) -> RunFolder:
        settings = self.config[self.subcommand]
        step = None if self.resumption is None else self.resumption.step
        return RunFolder(settings.run_dir or fresh_folder(runs_of(settings)), self._dumped(settings), loggers, step)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Lightning's own table of the validation is not printed, see ``after_validate``."""
        found: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return found | ({"verbose": False} if subcommand == "validate" else {})

    def after_validate(self) -> None:
        """Print the data report and the metrics."""
        report = getattr(self.datamodule, "report", None)
        if report is not None:
            print(report.render())
        source = self.config.validate.ckpt_path or "the untrained model"
        rich.get_console().print(validation_table(self.trainer.callback_metrics, f"validation of {source}"))

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException as end:  # would be an exit with code 0
            raise Stopped(signal.SIGTERM) from end
        except SystemExit as end:
            if not isinstance(end.__context__, KeyboardInterrupt):
                raise
            self._say_how_to_resume()
            raise end.__context__ from None

    def _say_how_to_resume(self) -> None:
        folder = run_folder(self.trainer)
        if folder is not None and (folder / "checkpoints" / LAST).exists():
            rank_zero_print(f"go on with it by\n  python -m lit_align fit --resume {shlex.quote(str(folder))}")


def runs_of(settings: Any) -> Path:
    """The folder of all runs of the objective that is set."""
    root = Path(settings.trainer.default_root_dir or RUNS)
    return root / class_named(settings.model.class_path).__module__.rsplit(".", 1)[-1]


@rank_zero_only
def rank_zero_print(text: str) -> None:
    """Print, on one rank of several."""
    print(text, flush=True)


def fresh_folder(place: Path) -> Path:
    """A folder in ``place`` named by the time, and numbered if there is one of that second; it is not made yet."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (stamp if i == 1 else f"{stamp}-{i}" for i in range(1, 1000))
    return next(place / name for name in names if not (place / name).exists())
