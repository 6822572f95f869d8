"""Preference data for Lightning: pairs, or the best and the worst of scored completions."""

from __future__ import annotations

import functools
import importlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lit_align.assets import resolve
from lit_align.batch import CompletionBatch, Reward
from lit_align.data.collate import Group, collate
from lit_align.data.formats import read_examples
from lit_align.data.holdout import distinct_prompts, hold_out, prompt_key
from lit_align.data.loader import ResumableLoader, TrainingOrder, ValidationOrder, training_batches, validation_loader
from lit_align.data.pairs import as_pair
from lit_align.data.report import DataReport, SplitReport
from lit_align.data.rows import DataError, SplitMissing
from lit_align.data.sources import is_single_file, read_rows
from lit_align.data.text import Limits, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PreferenceData(LightningDataModule):
    """Pairs of completions, the better first.

    Validation rows come from ``validation_dataset`` if given; else from the dataset's own ``validation_split`` if it
    has one; else ``validation_size`` of the training rows are held out, by prompt.

    Args:
        dataset: "stories" for the packaged one; a local .jsonl, .json or .parquet file, or a folder of such; or a Hub
            name, ``name`` or ``name:config``.
        validation_dataset: As ``dataset``, for validation; a folder or Hub name is read at ``validation_split``.
        train_split: Split to train on, where the dataset has splits.
        validation_split: Split to validate on; None never looks for one.
        validation_size: What to hold out where there are no validation rows: a share in (0, 1), a number of rows >= 1,
            or 0 for none.
        columns: Our names (prompt, chosen, rejected, completions, rewards) to the dataset's.
        max_length: Most tokens of a prompt and one completion, >= 2.
        max_prompt_length: Most tokens of a prompt, in [1, max_length); None is half of ``max_length``.
        batch_size: Groups of a micro-batch on one rank, >= 1.
        validation_batch_size: The same in validation; None is ``batch_size``.
        max_rows: Read at most this many rows of each split, >= 1; None reads all.
        max_dropped: Largest accepted share of dropped rows, in [0, 1].
        seed: Order of the data and choice of held-out prompts.
        num_workers: Processes that collate, >= 0; tokenized data is in memory, so 0 is usually fastest.

    Raises:
        DataError: If an argument is out of its range.
    """

    def __init__(
        self,
        dataset: str = "stories",
        validation_dataset: str | None = None,
        train_split: str = "train",
        validation_split: str | None = "validation",
        validation_size: int | float = 0.05,
        columns: dict[str, str] | None = None,
        max_length: int = 512,
        max_prompt_length: int | None = None,
        batch_size: int = 8,
        validation_batch_size: int | None = None,
        max_rows: int | None = None,
        max_dropped: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        _at_least("max_length", max_length, 2, "tokens of a prompt and one completion")
        max_prompt_length = max_length // 2 if max_prompt_length is None else max_prompt_length
        _at_least("batch_size", batch_size, 1, "groups of a micro-batch on one rank")
        _at_least("validation_batch_size", validation_batch_size, 1, "leave it out to use batch_size")
        _at_least("max_rows", max_rows, 1, "leave it out to read all rows")
        _at_least("num_workers", num_workers, 0, "0 collates in the main process")
        _check_limits(max_length, max_prompt_length)
        _check_shares(validation_size, max_dropped)
        self.dataset, self.validation_dataset = dataset, validation_dataset
        self.train_split, self.validation_split, self.validation_size = train_split, validation_split, validation_size
        self.columns, self.limits = columns, Limits(max_length, max_prompt_length)
        self.batch_size, self.validation_batch_size = batch_size, validation_batch_size or batch_size
        self.max_rows, self.max_dropped, self.seed, self.num_workers = max_rows, max_dropped, seed, num_workers
        self.report = DataReport()
        self._train: list[Group] = []
        self._validation: list[Group] = []
        self._pad_id = 0

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize on every rank, once; called by Lightning before the model loads.

        Raises:
            DataError: If the data cannot be trained on, or Lightning would shard it a second time.
        """
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("setup needs a trainer; without one call load(tokenizer)")
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise DataError(
                f"use_distributed_sampler=True with {trainer.world_size} ranks would shard the data twice; "
                "the order here is already one per rank, so set Trainer(use_distributed_sampler=False)"
            )
        if not self._train:
            self.load(trainer.lightning_module.tokenizer)  # type: ignore[arg-type]

    def load(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read, check, tokenize and report; what ``setup`` does, for use without a trainer.

        Args:
            tokenizer: The policy's.

        Raises:
            DataError: If the data cannot be trained on; the message names the place and the remedy.
        """
        if self.limits.max_total > tokenizer.model_max_length:
            warnings.warn(
                f"max_length={self.limits.max_total} is more than the {tokenizer.model_max_length} tokens the "
                f'tokenizer of "{tokenizer.name_or_path}" says its model reads; lower max_length unless it is wrong',
                stacklevel=2,
            )
        pad_id = tokenizer.pad_token_id
        self._pad_id = int(pad_id if pad_id is not None else tokenizer.eos_token_id or 0)
        train, report = self._read(self.dataset, self.train_split, tokenizer)
        found = self._read_validation(tokenizer)
        if found is None and self.validation_size:
            train, held = hold_out(train, self.validation_size, self.seed)
            report.held_out = len(held)
            found = held, SplitReport(f"{report.source}, held out", read=len(held))
        report.measure(train)
        self._train, parts = train, {"train": report}
        if found is not None:
            self._validation, parts["validation"] = found
            _note_shared(train, *found)
            parts["validation"].measure(self._validation)
        self.report = DataReport(parts)

    def _read(self, dataset: str, split: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Group], SplitReport]:
        source = read_rows(resolve(dataset), split, self.max_rows)
        report = SplitReport(source.name, read=len(source.rows) + len(source.problems))
        examples = read_examples(source, self.columns, report)
        pairs = [pair for example in examples if (pair := as_pair(example, report)) is not None]
        groups = tokenize(pairs, tokenizer, self.limits, report)
        report.check(self.max_dropped)
        return groups, report

    def _read_validation(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Group], SplitReport] | None:
        """The rows set apart by the user or the dataset's author; None if there are none."""
        if self.validation_dataset is not None:
            return self._read(self.validation_dataset, self.validation_split or self.train_split, tokenizer)
        if self.validation_split is None or is_single_file(resolve(self.dataset)):
            return None
        try:
            return self._read(self.dataset, self.validation_split, tokenizer)
        except SplitMissing:
            return None

    def train_dataloader(self) -> ResumableLoader:
        """This rank's training batches; see ``TrainingOrder`` for their order."""
        shuffle = not (self.trainer is not None and getattr(self.trainer, "overfit_batches", False))
        order = TrainingOrder(len(self._train), self.batch_size, self.seed, *self._rank(), shuffle=shuffle)
        return ResumableLoader(self._train, order, functools.partial(collate, pad_id=self._pad_id), self.num_workers)

    def val_dataloader(self) -> DataLoader[CompletionBatch] | list[Any]:
        """This rank's validation batches, each group on exactly one rank; an empty list without validation."""
        if not self._validation:
            return []
        order = ValidationOrder(len(self._validation), self.validation_batch_size, *self._rank())
        return validation_loader(self._validation, order, functools.partial(collate, pad_id=self._pad_id))

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def train_batches(self, world_size: int = 1) -> int:
        """Micro-batches per epoch and rank, for schedules; after ``setup``.

        Args:
            world_size: Ranks, >= 1.
        """
        self._require_loaded()
        return training_batches(len(self._train), self.batch_size, world_size)

    def prompts(self, n: int) -> CompletionBatch:
        """The first distinct prompts of validation, else of training, with their completions; after ``setup``.

        Args:
            n: How many, >= 1; fewer come back where there are not as many.
        """
        self._require_loaded()
        return collate(distinct_prompts(self._validation or self._train, n), self._pad_id)

    def save_report(self, path: str | Path) -> None:
        """Write the data report as JSON."""
        self.report.save(path)

    @property
    def oracle(self) -> Reward | None:
        """The reward that scored the packaged dataset; None for any other."""
        folder = resolve(self.dataset)
        if folder == self.dataset:
            return None
        about = json.loads((Path(folder) / "about.json").read_text(encoding="utf-8"))
        module, _, name = str(about["oracle"]).rpartition(".")
        oracle: Reward = getattr(importlib.import_module(module), name)()
        return oracle

    def _require_loaded(self) -> None:
        if not self._train:
            raise RuntimeError("the data is not read yet: call setup (Lightning does) or load(tokenizer) first")


def _note_shared(train: Sequence[Group], validation: Sequence[Group], report: SplitReport) -> None:
    """Count validation prompts that are trained on."""
    trained = {prompt_key(group) for group in train}
    for group in validation:
        if prompt_key(group) in trained:
            report.note("prompt also in training", f"row {group.row}")


def _at_least(name: str, value: int | None, least: int, remedy: str) -> None:
    if value is not None and value < least:
        raise DataError(f"data.{name}={value} must be at least {least}: {remedy}")


def _check_limits(max_length: int, max_prompt_length: int) -> None:
    if not 1 <= max_prompt_length < max_length:
        raise DataError(
            f"data.max_prompt_length={max_prompt_length} must be from 1 to {max_length - 1}, below "
            f"max_length={max_length}, so that completions keep some tokens; leave it out for half of max_length"
        )


def _check_shares(validation_size: int | float, max_dropped: float) -> None:
    if validation_size < 0 or (isinstance(validation_size, float) and validation_size >= 1):
        raise DataError(
            f"data.validation_size={validation_size} must be a share in (0, 1), a whole number of rows from 1, or 0 "
            "for no validation"
        )
    if not 0 <= max_dropped <= 1:
        raise DataError(f"data.max_dropped={max_dropped} must be a share from 0 to 1; 1 accepts any loss")
