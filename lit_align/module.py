"""AlignModule: what every objective shares. A subclass adds hyperparameters and ``loss``; nothing else subclasses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from lit_align.batch import Batch, CompletionBatch, Loss, Rollout, Sampling, Scores, completions_of
from lit_align.checks import (
    check_cache,
    check_groups,
    check_precision,
    check_start,
)
from lit_align.contents import check_fit, keep_trained
from lit_align.draws import draw, reward_pool
from lit_align.finite import FiniteSteps
from lit_align.metrics import Total
from lit_align.models import load_tokenizer
from lit_align.monitor import AfterBatch, Monitor, write_row
from lit_align.optimizer import planned_steps, scheduled_adamw
from lit_align.settings import OptimSettings, PairSettings

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
    from transformers import PreTrainedTokenizerBase

    from lit_align.pair import PolicyReferencePair

CHECKED_GROUPS = 64
"""Groups looked at before the model is loaded."""

OBSERVED_GROUPS = 8
"""Groups of a fresh buffer whose KL and entropy are measured: a small share of the time that drawing it took."""


CACHED_GAP = 1e-4
"""Nats a token by which log-probs kept from another batch may differ: ten times what rounding does in float32."""


class AlignModule(LightningModule, ABC):
    """A policy trained against its reference by some objective.

    Reduction happens here and nowhere else: the gradient of an optimizer step is sum(value · weight) over all its
    micro-batches and ranks divided by the sum of the weights, however the step was cut.

    Args:
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    stats: ClassVar[tuple[str, ...]] = ()
    """Names of the scalars the objective reports in ``Loss.stats``."""

    columns: ClassVar[tuple[int, int]] = (2, 2)
    """Fewest and most completions a group may have."""

    needs_reward: ClassVar[bool] = False
    """Whether the loss reads ``CompletionBatch.reward``."""

    compares: ClassVar[bool] = True
    """Whether the loss tells better completions from worse; False imitates all that it is given."""

    rollouts: ClassVar[bool] = False
    """Whether ``loss`` reads a Rollout, with what ``annotate`` fixed, instead of its completions alone."""

    mixes: ClassVar[bool] = False
    """Whether ``loss`` can read a MixedBatch, samples of the policy beside the completions."""

    needs_fresh: ClassVar[bool] = False
    """Whether only completions that the policy itself has just drawn will do."""

    moves_reference: ClassVar[bool] = False
    """Whether the reference changes as training goes, which then has weights of its own."""

    generates: ClassVar[bool] = True
    """Whether what is trained writes text, so that samples of it say something."""

    loading: ClassVar[tuple[str, ...]] = ()
    """Lines of Python that load what ``save`` wrote to ``{folder}``; none where it is an adapter like any other."""

    def __init__(self, pair: PairSettings = PairSettings(), optim: OptimSettings = OptimSettings()) -> None:
        super().__init__()
        self.pair_settings = pair
        self.optim_settings = optim
        self.pair: PolicyReferencePair | None = None
        self.source: Any = None
        self.monitor = Monitor(self.stats)
        # A metric, not a buffer: data parallelism would overwrite every rank's buffers with those of rank 0.
        self.step_weight = Total()
        self._finite = FiniteSteps()
        self.strict_loading = False
        self._scores: Scores | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._stepped = False
        self._size = 0
        self._rate = 0.0
        self._recurring = False

    @abstractmethod
    def loss(self, batch: Any) -> Loss:
        """The loss of a micro-batch, one value for each group, completion or token, not reduced.

        Args:
            batch: A CompletionBatch; a Rollout where the class sets ``rollouts``; a MixedBatch where the data mixes.
        """

    def annotate(self, rollout: Rollout) -> Rollout:
        """Fix what depends on the whole of a fresh buffer, once, before it is cut into minibatches.

        Completions of a dataset pass through here as well, a micro-batch at a time, without ``old_logps``; see
        ``reward_pool`` for what is then the whole.

        Args:
            rollout: The buffer of this rank. A group whose reward failed is there with no column present.
        """
        return rollout

    def adapt(self) -> None:
        """Update adaptive state from the statistics of an optimizer step that has just been taken."""

    def save(self, directory: str | Path) -> None:
        """Write what was trained for use elsewhere: the adapter in peft's format, and what an objective adds."""
        assert self.pair is not None
        self.pair.save_adapter(directory)

    def score(
        self,
        batch: CompletionBatch,
        *,
        reference: bool = True,
        epsilon: float | None = None,
        value_head: Callable[[Tensor], Tensor] | None = None,
    ) -> Scores:
        """Score a batch for the loss, and keep the scores for the metrics.

        Args:
            batch: The completions.
            reference: Whether the objective needs the reference.
            epsilon: Perturbation of ε-DPO's mixtures, or None.
            value_head: A critic on the policy's last hidden states, or None; see ``PolicyReferencePair.score``.

        Raises:
            UserError: If policy and reference differ before the first optimizer step.
        """
        assert self.pair is not None
        kl = reference and self._shows_kl()
        trainer = self._trainer
        recurring = self._recurring and trainer is not None and trainer.training
        # A fresh buffer is annotated outside Lightning's own context, and must be scored as in a step.
        with nullcontext() if trainer is None else trainer.precision_plugin.forward_context():
            scores = self.pair.score(
                batch, reference=reference, epsilon=epsilon, kl=kl, value_head=value_head, recurring=recurring
            )
        self._scores = scores
        if reference and self.training_starts:
            check_start(scores, self.pair_settings.model, CACHED_GAP if self.pair.known else 0.0)
        return scores

    def over_ranks(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, for statistics of the micro-batch that all of them share.

        Args:
            values: Any shape, the same on every rank; no gradient goes through.

        Returns:
            The sum, the same shape.
        """
        trainer = self._trainer
        summed = values.detach().clone()
        return summed if trainer is None else trainer.strategy.reduce(summed, reduce_op="sum")

    def from_ranks(self, values: Tensor) -> Tensor:
        """The values of all ranks, one rank after the other; ranks may have different numbers of them.

        Args:
            values: (N,); no gradient goes through.

        Returns:
            The values, (sum of all N,), the same on every rank.
        """
        ranks = 1 if self._trainer is None else self.trainer.world_size
        counts = torch.zeros(ranks, dtype=torch.int64, device=values.device)
        counts[self.global_rank] = len(values)
        ends = self.over_ranks(counts).cumsum(0)
        end = int(ends[self.global_rank])
        found = torch.zeros(int(ends[-1]), dtype=values.dtype, device=values.device)
        found[end - len(values) : end] = values.detach()
        return self.over_ranks(found)

    def reward_pool(self, batch: CompletionBatch) -> Tensor:
        """All rewards that a reward is to be compared with, over all ranks.

        Args:
            batch: The fresh buffer of this rank, or a micro-batch of a dataset.

        Returns:
            The rewards of the buffers of all ranks; for a dataset those of all its training completions, float32 (N,).
        """
        return reward_pool(batch, self._trainer)

    def generate(self, prompts: CompletionBatch, completions: int, sampling: Sampling) -> Rollout:
        """Draw completions of each prompt from the policy as it is; see ``PolicyReferencePair.generate``.

        ``old_logps`` are log π_θ: those of the draw, or the scorer's where the draw is truncated or at another
        temperature than the policy's.
        """
        assert self.pair is not None
        rollout = draw(self.pair, prompts.to(self.device), completions, sampling)
        taken = 0 if self._trainer is None else self.trainer.global_step
        return rollout._replace(drawn_at=torch.full_like(rollout.completions.row, taken))

    @torch.no_grad()
    def observe(self, rollout: Rollout, seconds: float) -> None:
        """Measure a fresh buffer for the log.

        Args:
            rollout: Completions and rewards, as they will be annotated.
            seconds: How long it took to draw and to judge them.
        """
        assert self.pair is not None
        rollout = rollout.to(self.device)
        some = rollout.completions.rows(slice(0, OBSERVED_GROUPS))
        ended = self.pair.ended(rollout.completions)
        self.monitor.fresh(rollout, self.pair.score(some, kl=True, entropy=True), ended, seconds)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded at first use; the model itself need not be there."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.pair_settings)
        return self._tokenizer

    @property
    def training_starts(self) -> bool:
        """Whether a run is before its first optimizer step, when policy and reference must agree."""
        trainer = self._trainer
        return trainer is not None and trainer.training and trainer.global_step == 0

    def setup(self, stage: str) -> None:
        """Refuse data the objective cannot learn from; called by Lightning before the model is loaded.

        Raises:
            UserError: If groups have too few or too many completions, or no rewards where they are needed.
        """
        check_precision(str(self.trainer.precision))
        check_cache(self.pair_settings.reference_cache, str(self.trainer.precision))
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "examples"):
            self.check_source(data)

    def check_source(self, data: Any) -> Any:
        """Refuse, with a UserError, a data module this objective cannot learn from; else some of its groups."""
        self.source = data
        batch = data.examples(CHECKED_GROUPS)
        check_groups(type(self), data, batch)
        self.check_data(batch)
        return batch

    def check_data(self, batch: Any) -> None:
        """Refuse, with a UserError, groups this objective cannot learn from; ``source`` is the data module."""

    def configure_model(self) -> None:
        """Build the pair on the device of this process; called by Lightning after the data has been read."""
        if self.pair is None:
            from lit_align.pair import PolicyReferencePair

            device = self.trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")
            eos = None if self._tokenizer is None else self._tokenizer.eos_token_id  # the data has loaded it
            self.pair = PolicyReferencePair(self.pair_settings, device, eos)
            self._size = self.pair.base.num_parameters()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW on what is trained, and a schedule over the planned number of optimizer steps."""
        assert self.pair is not None
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        total = planned_steps(self.trainer)
        return scheduled_adamw(trained, self.optim_settings, self._size, total)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start the clock of the throughput."""
        assert self.pair is not None
        self.monitor.start(self.pair.cells)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The summed loss of a micro-batch; ``on_before_optimizer_step`` divides by the weight of the whole step."""
        if self._finite.step_begins:
            self.monitor.mark()
        loss = self._loss(batch)
        self.step_weight.update(loss.weight)
        self.monitor.trained(batch, self._scores, loss, self.trainer.global_step)
        total = (loss.value * loss.weight).sum()
        self._finite.saw(completions_of(batch).row, total)
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the summed gradient into the mean over the weight of all micro-batches and ranks of this step."""
        weight, _ = self.step_weight.compute()
        self.step_weight.reset()
        # Lightning has divided by the micro-batches of a full step, and data parallelism by the ranks.
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / weight.clamp(min=1e-12)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
        self._finite.check(self)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, then let the objective adapt; a step that was skipped leaves no trace but its count."""
        self._rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        super().optimizer_step(*args, **kwargs)
        self._stepped = True
        if not self._finite.skipped:
            self.adapt()
            return
        self.monitor.rewind()
        for part in self.modules():
            if isinstance(part, Total):
                part.reset()

    def configure_callbacks(self) -> list[Callback]:
        """What comes between a step and its checkpoint; the module's own hooks would come after it."""
        return [self._finite, AfterBatch()]

    def after_batch(self, batch: Batch) -> None:
        """Count tokens; at the end of a logging interval report what was seen in it."""
        assert self.pair is not None
        self.monitor.count(batch, self.pair.cells)
        if not self._stepped:
            return
        self._stepped = False
        if self.trainer.global_step % self._log_every() == 0:
            skipped = {"train/skipped_steps": float(self._finite.total)} if self._finite.total else {}
            write_row(self, {**self.monitor.report(), "train/learning_rate": self._rate, **skipped})

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a micro-batch to the validation metrics."""
        loss = self._loss(batch)
        self.monitor.validation.update(completions_of(batch), self._scores, loss)

    def on_validation_epoch_end(self) -> None:
        """Report the validation metrics over all micro-batches and ranks."""
        self.log_dict(self.monitor.validation.compute(), on_step=False, on_epoch=True)
        self.monitor.validation.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changes: the adapter, adaptive state and metrics, never the base."""
        keep_trained(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not hold all that is trained.

        Raises:
            UserError: If tensors are missing or have another shape, with the first of them.
        """
        check_fit(self, checkpoint)

    def _loss(self, batch: Batch) -> Loss:
        """The loss of what a loader hands out; a dataset is annotated here, as fresh buffers already are."""
        self._recurring = isinstance(batch, CompletionBatch)
        if self.rollouts and isinstance(batch, CompletionBatch):
            batch = self.annotate(Rollout(batch))
        keep = self.rollouts or not isinstance(batch, Rollout)
        return self.loss(batch if keep else completions_of(batch))

    def _shows_kl(self) -> bool:
        """KL is for the eye: in validation, and in the optimizer steps whose metrics are written."""
        trainer = self._trainer
        if trainer is None or not trainer.training:
            return True
        return (trainer.global_step + 1) % self._log_every() == 0

    def _log_every(self) -> int:
        return max(1, getattr(self.trainer, "log_every_n_steps", 1))
