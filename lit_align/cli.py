"""The command line: LightningCLI with the product's defaults, its run folder and its callbacks."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_align.callbacks.adapter import SaveAdapter
from lit_align.callbacks.curves import Curves
from lit_align.callbacks.memory import MemoryPlan
from lit_align.callbacks.progress import Progress
from lit_align.callbacks.run_folder import RunFolder
from lit_align.callbacks.samples import SampleTable
from lit_align.errors import UserError
from lit_align.mistakes import remember_folder
from lit_align.module import AlignModule
from lit_align.parser import AlignParser, classes_first, own_rules, register

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
NOISE = (
    ".*does not have many workers.*",
    ".*Total length of `list` across ranks is zero.*",  # no validation
    ".*smaller than the logging interval.*",
    ".*tensorboardX.*",
    ".*Experiment logs directory .* exists and is not empty.*",  # the run folder, made a moment before
    ".*module\\(s\\) in eval mode at the start of training.*",  # the frozen base is meant to be
    ".*`is_gradient_checkpointing` is deprecated.*",  # raised and meant for transformers itself
    ".*sync_dist=True.*when logging on epoch level.*",  # torchmetrics has already added up the ranks
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)
"""Warnings about nothing the user could or should change."""


def run(args: Sequence[str]) -> None:
    """Parse the arguments and run the subcommand they begin with.

    Args:
        args: Arguments without the program's name.

    Raises:
        UserError: For what the user can put right.
        KeyboardInterrupt: After an orderly end on Ctrl-C.
    """
    quiet()
    remember_folder()
    register()
    with own_rules():
        AlignCLI(args)


def quiet() -> None:
    """Silence tips and hints of the libraries; their real warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of optional CPU kernels
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


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
        parser.add_lightning_class_args(SampleTable, "samples")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and fill in what depends on other settings."""
        self.config = parser.parse_args(classes_first(args))
        settings = self.config[self.config.subcommand]
        trainer = settings.trainer
        if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
            trainer.max_epochs = 1
        check_accelerator(trainer.accelerator)
        check_checkpoint(settings.ckpt_path)

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
        default_loggers = config["logger"] in (None, True)
        if default_loggers:
            config["logger"] = False  # RunFolder attaches them when training starts
        if self.subcommand != "fit" or config["fast_dev_run"]:
            config["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in users)
            return self._checked_trainer(config | {"callbacks": users + own})
        folder = self._run_folder(default_loggers)
        own += [MemoryPlan(), self._get(self.config_init, "samples"), Curves(), SaveAdapter()]
        if config["enable_checkpointing"] is not False and not any(isinstance(c, ModelCheckpoint) for c in users):
            own.append(last_checkpoint(folder.path))
        return self._checked_trainer(config | {"callbacks": [folder, *users, *own], "default_root_dir": folder.path})

    def _checked_trainer(self, config: dict[str, Any]) -> Trainer:
        try:
            return self.trainer_class(**config)
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise UserError(f"Lightning refuses the settings under trainer: {error}") from error

    def _run_folder(self, loggers: bool) -> RunFolder:
        settings = self.config[self.subcommand]
        saved = settings.clone()
        saved.run_dir = None  # so that the file can be given to --config again
        text = self._parser(self.subcommand).dump(saved, skip_unset=False)
        root = settings.trainer.default_root_dir or "runs"
        objective = type(self.model).__module__.rsplit(".", 1)[-1]
        return RunFolder(settings.run_dir or fresh_folder(Path(root) / objective), text, loggers)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:
            if self.trainer.interrupted:
                raise KeyboardInterrupt from None
            raise


def fresh_folder(place: Path) -> Path:
    """A folder in ``place`` named by the time, and numbered if there is one of that second; it is not made yet."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (stamp if i == 1 else f"{stamp}-{i}" for i in range(1, 1000))
    return next(place / name for name in names if not (place / name).exists())


def last_checkpoint(folder: Path) -> ModelCheckpoint:
    """Keep the newest state, at the end of each epoch, in ``checkpoints/last.ckpt``."""
    return ModelCheckpoint(
        folder / "checkpoints", filename="last", save_on_train_epoch_end=True, enable_version_counter=False
    )


def check_accelerator(name: Any) -> None:
    """Refuse a GPU that is not there, before anything is loaded.

    Raises:
        UserError: With what PyTorch sees and the remedies.
    """
    if name in {"auto", "gpu", "mps"} and torch.backends.mps.is_available():
        raise UserError(
            f"trainer.accelerator={name} would take the Apple GPU, which lacks float64, and metrics and adapted values "
            "are held in that: use --trainer.accelerator cpu"
        )
    if name in {"gpu", "cuda"} and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator is {name}, but PyTorch {torch.__version__} sees no GPU. If there is one, check that "
            "nvidia-smi lists it and that PyTorch was built for CUDA (https://pytorch.org/get-started); otherwise use "
            "--trainer.accelerator cpu, or put --config configs/hardware/cpu.yaml last"
        )


def check_checkpoint(path: str | None) -> None:
    """Refuse a checkpoint that is not there, before anything is loaded.

    Raises:
        UserError: With the path.
    """
    if path and path not in {"last", "best", "hpc", "registry"} and "://" not in path and not Path(path).is_file():
        raise UserError(f"ckpt_path={path}: there is no such file; runs keep theirs in RUN_DIR/checkpoints/last.ckpt")
