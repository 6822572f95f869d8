"""Preference pairs beside samples of the policy, which it draws now and then as training goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer

from lit_align.batch import MixedBatch, Rollout, Sampling
from lit_align.data.arguments import at_least
from lit_align.data.buffer import packed, unpacked
from lit_align.data.completions import CompletionData
from lit_align.data.formats import PREFERENCES, Example
from lit_align.data.fresh import PromptStream, gathered
from lit_align.data.loader import ResumableLoader
from lit_align.data.pairs import as_pair
from lit_align.data.report import SplitReport
from lit_align.data.rows import DataError
from lit_align.protocols import Learner


class MixedLoader:
    """Pairs in their order, each micro-batch with a share of the newest samples; an optimizer step sees all of them.

    Samples are drawn when the first micro-batch of an optimizer step is asked for, and serve ``every`` steps. It has a
    length and no workers, so that nothing is asked for ahead: the policy that draws is that of the step.

    Args:
        pairs: The loader of the pairs.
        learner: Draws samples.
        stream: The prompts of this rank.
        number: Samples on this rank, >= the micro-batches of a step.
        sampling: How they are drawn.
        every: Optimizer steps between two draws, >= 1.
        trainer: Knows the steps taken and the micro-batches of a step and of an epoch.
        gather: Every rank's value of something, on every rank; the checkpoint of one rank holds the samples of all.
    """

    def __init__(
        self,
        pairs: ResumableLoader,
        learner: Learner,
        stream: PromptStream,
        number: int,
        sampling: Sampling,
        every: int,
        trainer: Trainer,
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self.pairs, self.learner, self.stream, self.number = pairs, learner, stream, number
        self.sampling, self.every, self.trainer, self.gather = sampling, every, trainer, gather
        self.samples: Rollout | None = None
        self.place = 0

    @property
    def batch_sampler(self) -> Any:
        """The order of the pairs, where Lightning looks for ``set_epoch``."""
        return self.pairs.batch_sampler

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[MixedBatch]:
        for batch in self.pairs:
            index = self.pairs.order.position - 1
            size = self.trainer.accumulate_grad_batches
            part, begin = index % size, index - index % size
            if self.samples is None or (part == 0 and self._age(self.samples) >= self.every):
                self.samples = self._draw()
            # The last step of an epoch may have fewer micro-batches.
            parts = min(size, int(self.trainer.num_training_batches) - begin)
            share = torch.arange(len(self.samples.completions.row)).tensor_split(parts)[part]
            yield MixedBatch(batch, self.samples.rows(share))

    def _age(self, samples: Rollout) -> int:
        assert samples.drawn_at is not None
        return self.trainer.global_step - int(samples.drawn_at[0])

    def _draw(self) -> Rollout:
        begin = time.perf_counter()
        samples = self.stream.draw(self.learner, self.place, self.number, 1, self.sampling)
        self.place += self.number
        self.learner.observe(samples, time.perf_counter() - begin)
        return samples

    def state_dict(self) -> dict[str, Any]:
        """The place in the pairs and in the prompts, and the samples of all ranks; every rank must ask."""
        own = None if self.samples is None else packed(self.samples)
        dealt = self.place * self.stream.world_size
        return {"pairs": self.pairs.state_dict(), "dealt": dealt, "for": self._settings(), "ranks": self.gather(own)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which the state was saved; with other ranks or sampling, on samples drawn anew.

        Raises:
            DataError: If the state is from the middle of an epoch and the data or its order have changed since.
        """
        self.pairs.load_state_dict(state["pairs"])
        self.place = -(-state["dealt"] // self.stream.world_size)
        own = state["ranks"][self.stream.rank] if state["for"] == self._settings() else None
        self.samples = None if own is None else unpacked(own)

    def _settings(self) -> dict[str, Any]:
        """What samples of a checkpoint must agree with."""
        ranks = self.stream.world_size
        return {"samples": self.number * ranks, "max_new_tokens": self.sampling.max_new_tokens, "devices": ranks}


class MixedData(CompletionData):
    """Pairs as ``PreferenceData`` gives them, and beside them samples of the policy, for SPO (arXiv 2405.00747).

    Before the first optimizer step, and then every ``every_n_steps`` steps, the policy as it is draws one completion
    of each of ``samples`` training prompts, from its full distribution at ``model.pair.temperature``. The steps up to
    the next draw all learn from these. Prompts come in an order of their own, one after the other, and begin again
    when they are used up. Validation has pairs only. The arguments that are not listed are those of
    ``PreferenceData``.

    Args:
        dataset: "stories" for the packaged one; a local .jsonl, .json or .parquet file, or a folder of such; or a Hub
            name, ``name`` or ``name:config``.
        samples: Completions of one draw, over all ranks and accumulated micro-batches, of which it is a multiple.
        every_n_steps: Optimizer steps that one draw serves, >= 1.
        max_new_tokens: Token budget of a sample, from 1 to what ``max_prompt_length`` leaves of ``max_length``.

    Raises:
        DataError: If an argument is out of its range.
    """

    formats = PREFERENCES

    def __init__(
        self,
        dataset: str = "stories",
        samples: int = 32,
        every_n_steps: int = 8,
        max_new_tokens: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        at_least("samples", samples, 1, "completions of one draw; 32 is usual")
        at_least("every_n_steps", every_n_steps, 1, "optimizer steps that one draw serves; 8 is usual")
        at_least("max_new_tokens", max_new_tokens, 1, "tokens of a sample")
        budget = self.limits.max_total - self.limits.max_prompt
        if max_new_tokens > budget:
            raise DataError(
                f"data.max_new_tokens={max_new_tokens} must be from 1 to {budget}, which max_prompt_length="
                f"{self.limits.max_prompt} leaves of max_length={self.limits.max_total}; lower it, or raise max_length"
            )
        if self.num_workers:
            raise DataError(
                f"data.num_workers={self.num_workers} must be 0 beside samples of the policy, which only the process "
                "that trains can draw; leave it out"
            )
        self.samples, self.every_n_steps = samples, every_n_steps
        self.sampling = Sampling(max_new_tokens, seed=self.seed)

    def choose(self, example: Example, report: SplitReport) -> Example | None:
        """The pair, or the best and the worst completion."""
        return as_pair(example, report)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize; see ``CompletionData.setup``.

        Raises:
            DataError: If the data cannot be trained on, or the samples cannot be dealt to ranks and micro-batches.
        """
        if self.trainer is not None and stage == "fit":
            _check_share(self.samples, self.trainer.world_size, self.trainer.accumulate_grad_batches)
        super().setup(stage)

    def examples(self, n: int) -> MixedBatch:  # type: ignore[override]
        """Pairs, and groups shaped like samples: the prompts are real, a completion is one token 0."""
        pairs = self.prompts(n)
        shape = (len(pairs.row), 1)
        samples = pairs._replace(
            completion_ids=torch.zeros(*shape, 1, dtype=torch.int64),
            completion_mask=torch.ones(*shape, 1, dtype=torch.bool),
            reward=None,
            present=torch.ones(shape, dtype=torch.bool),
        )
        return MixedBatch(pairs, Rollout(samples))

    def train_dataloader(self) -> MixedLoader:  # type: ignore[override]
        """This rank's pairs and samples; see ``TrainingOrder`` for the order of the pairs."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("samples are drawn by the module of a trainer")
        rank, world_size = self._rank()
        return MixedLoader(
            pairs=super().train_dataloader(),
            learner=trainer.lightning_module,  # type: ignore[arg-type]
            # Another seed than that of the pairs, or the first samples would continue the prompts of the first steps.
            stream=PromptStream(self._train, -1 - self.seed, rank, world_size, self._pad_id),
            number=self.samples // world_size,
            sampling=self.sampling,
            every=self.every_n_steps,
            trainer=trainer,
            gather=gathered,
        )


def _check_share(samples: int, world_size: int, accumulate: int) -> None:
    unit = world_size * accumulate
    if samples % unit:
        raise DataError(
            f"data.samples={samples} must be a multiple of {unit}, so that each of {world_size} ranks times "
            f"{accumulate} accumulated micro-batches has as many; for example {-(-samples // unit) * unit}"
        )
