"""What every data module does: read, check, tokenize and report rows, and load them in an order that resumes."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lit_align.assets import resolve
from lit_align.batch import CompletionBatch
from lit_align.data.arguments import at_least, check_limits, check_sampler, check_shares, warn_of_length
from lit_align.data.collate import Group, all_rewards, collate
from lit_align.data.formats import Example, Format, read_examples
from lit_align.data.holdout import distinct_prompts, hold_out, note_shared
from lit_align.data.judge import RewardFunction
from lit_align.data.loader import (
    Collate,
    ResumableLoader,
    TrainingOrder,
    ValidationOrder,
    training_batches,
    validation_loader,
)
from lit_align.data.oracle import load_oracle
from lit_align.data.report import DataReport, Roles, SplitReport, chosen_and_rejected
from lit_align.data.rows import SplitMissing
from lit_align.data.sources import is_single_file, read_rows
from lit_align.data.text import Limits, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CompletionData(LightningDataModule, ABC):
    """Rows that become groups of completions; a final class says which rows it reads and what it makes of them.

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
        columns: Our names of columns (docs/data.md lists them) to the dataset's, where they differ.
        max_length: Most tokens of a prompt and one completion, >= 2.
        max_prompt_length: Most tokens of a prompt, in [1, max_length); None is half of ``max_length``.
        batch_size: Groups of a micro-batch on one rank, >= 1.
        length_window: Batches of all ranks together that are sorted by length before they are cut, >= 1, so that each
            holds groups of similar length; 1 leaves the batches to chance. docs/data.md says what it costs.
        validation_batch_size: The same in validation; None is ``batch_size``.
        max_rows: Read at most this many rows of each split, >= 1; None reads all.
        max_dropped: Largest accepted share of dropped rows, in [0, 1].
        seed: Order of the data and choice of held-out prompts.
        num_workers: Processes that collate, >= 0; tokenized data is in memory, so 0 is usually fastest.

    Raises:
        DataError: If an argument is out of its range.
    """

    comparing: bool = True
    """Whether the completions of a row are compared, so that a row is of use only with two that differ."""

    mismatched: bool = False
    """Whether a batch has a second column, completions of other prompts, which belongs to no group."""

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
        length_window: int = 1,
    ) -> None:
        super().__init__()
        at_least("max_length", max_length, 2, "tokens of a prompt and one completion")
        max_prompt_length = max_length // 2 if max_prompt_length is None else max_prompt_length
        at_least("batch_size", batch_size, 1, "groups of a micro-batch on one rank")
        at_least("length_window", length_window, 1, "1 leaves the batches to chance")
        at_least("validation_batch_size", validation_batch_size, 1, "leave it out to use batch_size")
        at_least("max_rows", max_rows, 1, "leave it out to read all rows")
        at_least("num_workers", num_workers, 0, "0 collates in the main process")
        check_limits(max_length, max_prompt_length)
        check_shares(validation_size, max_dropped)
        self.dataset, self.validation_dataset = dataset, validation_dataset
        self.train_split, self.validation_split, self.validation_size = train_split, validation_split, validation_size
        self.columns, self.limits = columns, Limits(max_length, max_prompt_length)
        self.batch_size, self.validation_batch_size = batch_size, validation_batch_size or batch_size
        self.length_window, self.num_workers = length_window, num_workers
        self.max_rows, self.max_dropped, self.seed = max_rows, max_dropped, seed
        self.report = DataReport()
        self._train: list[Group] = []
        self._validation: list[Group] = []
        self._pad_id = 0
        self.training_rewards: Tensor | None = None
        """Those of all training completions, of every rank, float32 (N,); None without rewards."""

    @property
    @abstractmethod
    def formats(self) -> Sequence[Format]:
        """The kinds of rows accepted; the first whose columns a dataset has is read."""

    @abstractmethod
    def choose(self, example: Example, report: SplitReport) -> Example | None:
        """The completions of a row to be trained on.

        Args:
            example: A row of one of ``formats``.
            report: Receives what was dropped, left out or noted.

        Returns:
            The example with these completions, best first where that is known; None, counted, where it is of no use.
        """

    def label(self, groups: list[Group], tokenizer: PreTrainedTokenizerBase, report: SplitReport) -> list[Group]:
        """Tokenized rows with the rewards they are trained by; as they are unless a class says otherwise."""
        return groups

    def split(self, group: Group, report: SplitReport) -> list[Group]:
        """The groups to make of a tokenized row; itself unless a class says otherwise."""
        return [group]

    def roles(self, groups: Sequence[Group]) -> Roles:
        """The parts that completions play, for the report."""
        return chosen_and_rejected(groups)

    def collator(self) -> Collate:
        """Makes a batch of groups; it can be sent to other processes."""
        return functools.partial(collate, pad_id=self._pad_id)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize on every rank, once; called by Lightning before the model loads.

        Raises:
            DataError: If the data cannot be trained on, or Lightning would shard it a second time.
        """
        if self.trainer is None:
            raise RuntimeError("setup needs a trainer; without one call load(tokenizer)")
        check_sampler(self.trainer)
        if not self._train:
            self.load(self.trainer.lightning_module.tokenizer)  # type: ignore[arg-type]

    def load(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read, check, tokenize and report; what ``setup`` does, for use without a trainer.

        Args:
            tokenizer: The policy's.

        Raises:
            DataError: If the data cannot be trained on; the message names the place and the remedy.
        """
        warn_of_length(self.limits.max_total, tokenizer)
        pad_id = tokenizer.pad_token_id
        self._pad_id = int(pad_id if pad_id is not None else tokenizer.eos_token_id or 0)
        train, report = self._read(self.dataset, self.train_split, tokenizer)
        found = self._read_validation(tokenizer)
        if found is None and self.validation_size:
            train, held = hold_out(train, self.validation_size, self.seed)
            report.held_out = len({group.row for group in held})
            found = held, SplitReport(f"{report.source}, held out", read=report.held_out)
        report.measure(train, self.roles)
        self._train, parts = train, {"train": report}
        self.training_rewards = all_rewards(train)
        if found is not None:
            self._validation, parts["validation"] = found
            note_shared(train, *found)
            parts["validation"].measure(self._validation, self.roles)
        self.report = DataReport(parts)

    def _read(self, dataset: str, split: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Group], SplitReport]:
        source = read_rows(resolve(dataset), split, self.max_rows)
        report = SplitReport(source.name, read=len(source.rows) + len(source.problems))
        examples = read_examples(source, self.columns, report, self.formats, least=2 if self.comparing else 1)
        chosen = [one for example in examples if (one := self.choose(example, report)) is not None]
        tokenized = tokenize(chosen, tokenizer, self.limits, report, self.comparing)
        groups = self.label(tokenized, tokenizer, report)
        report.check(self.max_dropped)
        return [part for group in groups for part in self.split(group, report)], report

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
        lengths = [group.tokens for group in self._train]
        sizes = len(lengths), self.batch_size, self.seed, *self._rank()
        order = TrainingOrder(*sizes, shuffle=shuffle, lengths=lengths, window=self.length_window)
        return ResumableLoader(self._train, order, self.collator(), self.num_workers)

    def val_dataloader(self) -> DataLoader[CompletionBatch] | list[Any]:
        """This rank's validation batches, each group on exactly one rank; an empty list without validation."""
        if not self._validation:
            return []
        order = ValidationOrder(len(self._validation), self.validation_batch_size, *self._rank())
        return validation_loader(self._validation, order, self.collator())

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def train_batches(self, world_size: int = 1) -> int:
        """Micro-batches per epoch and rank, for schedules; after ``setup``.

        Args:
            world_size: Ranks, >= 1.
        """
        self._require_loaded()
        return training_batches(len(self._train), self.batch_size, world_size)

    @property
    def groups(self) -> Sequence[Group]:
        """The training groups, tokenized; after ``setup``."""
        return self._train

    def prompts(self, n: int) -> CompletionBatch:
        """The first distinct prompts of validation, else of training, with their completions; after ``setup``.

        Args:
            n: How many, >= 1; fewer come back where there are not as many.
        """
        self._require_loaded()
        return collate(distinct_prompts(self._validation or self._train, n), self._pad_id)

    def examples(self, n: int) -> CompletionBatch:
        """Training groups, to check before anything is loaded: the first of ``n`` distinct prompts, and those of the
        fewest and of the most completions in training and in validation.
        """
        self._require_loaded()
        sets = [groups for groups in (self._train, self._validation) if groups]
        extremes = [pick(groups, key=lambda group: len(group.completion_ids)) for groups in sets for pick in (min, max)]
        return collate([*distinct_prompts(self._train, n), *extremes], self._pad_id)

    def save_report(self, path: str | Path) -> None:
        """Write the data report as JSON."""
        self.report.save(path)

    @property
    def oracle(self) -> RewardFunction | None:
        """The reward that scored the packaged dataset; None for any other."""
        folder = resolve(self.dataset)
        return None if folder == self.dataset else load_oracle(Path(folder))

    def _require_loaded(self) -> None:
        if not self._train:
            raise RuntimeError("the data is not read yet: call setup (Lightning does) or load(tokenizer) first")
