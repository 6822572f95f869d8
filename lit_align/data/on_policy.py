"""On-policy data for Lightning: prompts whose completions the policy itself draws, as training goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lit_align.batch import CompletionBatch, Sampling
from lit_align.data.arguments import at_least, check_sampling
from lit_align.data.buffer import BufferLoader
from lit_align.data.collate import Group
from lit_align.data.completions import CompletionData
from lit_align.data.formats import CONVERSATION, IMPLICIT_PAIR, PROMPT, Example
from lit_align.data.fresh import Collector, PromptStream, gathered
from lit_align.data.judge import RewardFunction
from lit_align.data.report import Roles, SplitReport
from lit_align.data.rows import DataError
from lit_align.data.select import Select
from lit_align.protocols import Learner


class OnPolicyData(CompletionData):
    """Algorithm 1 of arXiv 2404.14367: draw completions, judge them, learn from them, and again.

    One iteration, which is one epoch of the trainer, draws ``buffer`` completions (B), ``completions`` (C) of each of
    B / C prompts, from the policy as it is; labels them with the reward; and takes ``passes`` (T) sweeps over them in
    minibatches of ``minibatch`` completions (M), an optimizer step each. B / M and T say how far off the policy its
    data may get. B and M count completions before ``select``, over all ranks and accumulated micro-batches. Prompts
    come in an order of their own, one after the other, and begin again when they are used up.

    Only the prompts of the dataset are read. There is no validation loss: held-out prompts serve the sample table. The
    arguments that are not listed are those of ``CompletionData``.

    Args:
        dataset: "stories" for the packaged one; a local .jsonl, .json or .parquet file, or a folder of such; or a Hub
            name, ``name`` or ``name:config``.
        reward: Judges completions: a class such as ``lit_align.rewards.TrainedReward``, or the dotted name of a
            function of your own from two lists, prompts and completions, to a list of numbers. None is the reward that
            the packaged dataset was scored with.
        completions: Completions of each prompt C, >= 1.
        buffer: Completions of one iteration B, a multiple of ``minibatch``.
        minibatch: Completions of an optimizer step M, a multiple of ``completions``.
        passes: Sweeps over the buffer T, >= 1.
        select: Of the completions of a prompt, learn from: "ranked" all, best first; "best_and_worst" two; "best" one;
            "all_pairs" each better and worse one as a group of two. Prompts whose completions have equal rewards are
            left out where two are compared.
        max_new_tokens: Token budget of a completion, >= 1.
        temperature: Of the draws, > 0; None is ``model.pair.temperature``, at which drawing and training agree.
        top_k: Draw from the k most likely tokens, >= 0; 0 from all.
        top_p: Draw from the smallest set of tokens of at least this mass, in (0, 1]; 1 from all.
        max_prompt_length: Most tokens of a prompt, >= 1.
        max_length: Bound of ``max_prompt_length`` + ``max_new_tokens``, such as the model's context; None for none.
        batch_size: Bound of the groups of a micro-batch on one rank, which ``minibatch`` and the trainer decide, >= 1;
            None for none.

    Raises:
        DataError: If an argument is out of its range.
    """

    fresh = True
    formats = (PROMPT, CONVERSATION, IMPLICIT_PAIR)

    def __init__(
        self,
        dataset: str = "stories",
        reward: RewardFunction | None = None,
        completions: int = 4,
        buffer: int = 128,
        minibatch: int = 32,
        passes: int = 1,
        select: Select = "ranked",
        max_new_tokens: int = 64,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        max_prompt_length: int = 256,
        max_length: int | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        at_least("max_new_tokens", max_new_tokens, 1, "tokens of a completion")
        at_least("max_prompt_length", max_prompt_length, 1, "tokens of a prompt")
        at_least("max_length", max_length, max_prompt_length + max_new_tokens, "max_prompt_length + max_new_tokens")
        at_least("batch_size", batch_size, 1, "groups of a micro-batch on one rank")
        super().__init__(
            dataset,
            max_length=max_prompt_length + max_new_tokens,
            max_prompt_length=max_prompt_length,
            batch_size=1,
            validation_batch_size=None,
            num_workers=0,
            length_window=1,
            **kwargs,
        )
        at_least("passes", passes, 1, "sweeps over the buffer")
        compared = select in {"best_and_worst", "all_pairs"}
        at_least("completions", completions, 2 if compared else 1, f"of each prompt, with select={select}")
        check_sampling(temperature, top_k, top_p)
        _check_multiple("minibatch", minibatch, "completions", completions)
        _check_multiple("buffer", buffer, "minibatch", minibatch)
        self.reward, self.select, self.completions = reward, select, completions
        self.buffer, self.minibatch, self.passes = buffer, minibatch, passes
        self.sampling = Sampling(max_new_tokens, temperature, top_k, top_p, self.seed)
        self.comparing, self.most_groups = select != "best", batch_size

    def choose(self, example: Example, report: SplitReport) -> Example | None:
        """The prompt alone."""
        return example._replace(completions=[], rewards=None)

    def roles(self, groups: Sequence[Group]) -> Roles:
        """None: there are prompts only."""
        return {}

    def load(self, tokenizer: Any) -> None:
        """Read and tokenize the prompts.

        Raises:
            DataError: If they cannot be read, or there is no reward.
        """
        if self.oracle is None:
            raise DataError(
                f"data.reward is not set, and the dataset {self.dataset} brings none: name a class such as "
                "lit_align.rewards.TrainedReward, or a function of your own from prompts and completions to numbers"
            )
        super().load(tokenizer)

    @property
    def oracle(self) -> RewardFunction | None:
        """The reward."""
        return super().oracle if self.reward is None else self.reward

    def examples(self, n: int) -> CompletionBatch:
        """Groups shaped like those that will be learned from: the prompts are real, completions and rewards are 0."""
        batch = self.prompts(n)
        columns = {"ranked": self.completions, "best": 1}.get(self.select, 2)
        shape = (len(batch.row), columns)
        return batch._replace(
            completion_ids=torch.zeros(*shape, 1, dtype=torch.int64),
            completion_mask=torch.ones(*shape, 1, dtype=torch.bool),
            reward=torch.zeros(shape),
            present=torch.ones(shape, dtype=torch.bool),
        )

    def train_batches(self, world_size: int = 1) -> int:
        """Micro-batches of an iteration on each rank.

        Args:
            world_size: Ranks, >= 1.
        """
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return self.passes * (self.buffer // self.minibatch) * accumulate

    def train_dataloader(self) -> BufferLoader:  # type: ignore[override]
        """This rank's buffers.

        Raises:
            DataError: If a minibatch cannot be cut for the ranks and accumulated micro-batches.
        """
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("completions are drawn by the module of a trainer")
        learner: Learner = trainer.lightning_module  # type: ignore[assignment]
        rank, world_size = self._rank()
        _check_share(self.minibatch, self.completions, world_size, trainer.accumulate_grad_batches, self.most_groups)
        batches = self.train_batches(world_size) // self.passes
        assert self.oracle is not None
        collector = Collector(
            learner=learner,
            stream=PromptStream(self._train, self.seed, rank, world_size, self._pad_id),
            reward=self.oracle,
            tokenizer=trainer.lightning_module.tokenizer,  # type: ignore[arg-type]
            prompts=self.buffer // (self.completions * world_size),
            completions=self.completions,
            sampling=self.sampling,
            select=self.select,
            least=batches,
        )
        sizes = {"completions": self.completions, "buffer": self.buffer, "minibatch": self.minibatch}
        settings = {**sizes, "passes": self.passes, "select": self.select, "devices": world_size}
        settings["micro-batches of a sweep"] = batches

        def stop() -> None:
            trainer.should_stop = True

        return BufferLoader(collector.collect, batches, self.passes, self.seed, rank, gathered, settings, stop)

    def val_dataloader(self) -> list[Any]:
        """None: a loss on completions of a dataset would say nothing of those the policy draws."""
        return []


def _check_multiple(name: str, value: int, of: str, unit: int) -> None:
    if value < 1 or value % unit:
        raise DataError(
            f"data.{name}={value} must be a multiple of data.{of}={unit}, so that no group is split; for example "
            f"{max(1, round(value / unit)) * unit}"
        )


def _check_share(minibatch: int, completions: int, world_size: int, accumulate: int, most: int | None) -> None:
    if (minibatch // completions) % (world_size * accumulate):
        unit = completions * world_size * accumulate
        raise DataError(
            f"data.minibatch={minibatch} completions cannot be cut into {world_size} ranks times {accumulate} "
            f"micro-batches of whole groups of {completions}; make it a multiple of {unit}, for example "
            f"{-(-minibatch // unit) * unit}"
        )
    groups = minibatch // (completions * world_size * accumulate)
    if most is not None and groups > most:
        enough = accumulate * -(-groups // most)
        raise DataError(
            f"data.minibatch={minibatch} makes micro-batches of {groups} groups of {completions} completions, and "
            f"data.batch_size={most} allows fewer: set trainer.accumulate_grad_batches to {enough} or more, or raise "
            "data.batch_size"
        )
