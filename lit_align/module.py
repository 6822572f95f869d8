"""AlignModule: what every objective shares. A subclass adds hyperparameters and ``loss``; nothing else subclasses."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss, Rollout, Scores
from lit_align.checks import check_groups, check_start
from lit_align.errors import UserError
from lit_align.metrics import Throughput, Total, standard_metrics
from lit_align.models import load_tokenizer
from lit_align.settings import OptimSettings, PairSettings, usual_learning_rate

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
    from transformers import PreTrainedTokenizerBase

    from lit_align.pair import PolicyReferencePair

log = logging.getLogger(__name__)


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

    def __init__(self, pair: PairSettings = PairSettings(), optim: OptimSettings = OptimSettings()) -> None:
        super().__init__()
        self.pair_settings = pair
        self.optim_settings = optim
        self.pair: PolicyReferencePair | None = None
        self.train_metrics = standard_metrics(self.stats).clone(prefix="train/")
        self.val_metrics = standard_metrics(self.stats).clone(prefix="val/")
        self.throughput = Throughput()
        # A metric, not a buffer: data parallelism would overwrite every rank's buffers with those of rank 0.
        self.step_weight = Total()
        self.strict_loading = False
        self._scores: Scores | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._clock = 0.0
        self._stepped = False

    @abstractmethod
    def loss(self, batch: CompletionBatch) -> Loss:
        """The loss of a micro-batch, one value for each group (or token), not reduced."""

    def annotate(self, batch: CompletionBatch) -> CompletionBatch | Rollout:
        """Fix what depends on the whole of a fresh buffer, once, before it is cut into minibatches."""
        return batch

    def adapt(self) -> None:
        """Update adaptive state from the statistics of an optimizer step that has just been taken."""

    def score(self, batch: CompletionBatch, *, reference: bool = True, epsilon: float | None = None) -> Scores:
        """Score a batch for the loss, and keep the scores for the metrics.

        Args:
            batch: The completions.
            reference: Whether the objective needs the reference.
            epsilon: Perturbation of ε-DPO's mixtures, or None.

        Raises:
            UserError: If policy and reference differ before the first optimizer step.
        """
        assert self.pair is not None
        scores = self.pair.score(batch, reference=reference, epsilon=epsilon, kl=reference and self._shows_kl())
        self._scores = scores
        if reference and self.training_starts:
            check_start(scores, self.pair_settings.model)
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
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "prompts"):
            check_groups(type(self).__name__, self.columns, self.needs_reward, type(data).__name__, data.prompts(1))

    def configure_model(self) -> None:
        """Build the pair on the device of this process; called by Lightning after the data has been read."""
        if self.pair is None:
            from lit_align.pair import PolicyReferencePair

            device = self.trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")
            eos = None if self._tokenizer is None else self._tokenizer.eos_token_id  # the data has loaded it
            self.pair = PolicyReferencePair(self.pair_settings, device, eos)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW on what is trained, and a schedule over the planned number of optimizer steps."""
        settings = self.optim_settings
        assert self.pair is not None
        rate = settings.learning_rate
        if rate is None:
            rate = usual_learning_rate(self.pair.base.num_parameters())
            log.info("learning rate %.2g, by the size of the model; model.optim.learning_rate sets another", rate)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=settings.weight_decay)
        total = self._planned_steps()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: settings.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Start the clock of the throughput."""
        self._clock = time.perf_counter()

    def training_step(self, batch: CompletionBatch, batch_idx: int) -> Tensor:
        """The summed loss of a micro-batch; ``on_before_optimizer_step`` divides by the weight of the whole step."""
        loss = self.loss(batch)
        self.step_weight.update(loss.weight)
        self.train_metrics.update(batch, self._scores, loss)
        return (loss.value * loss.weight).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the summed gradient into the mean over the weight of all micro-batches and ranks of this step."""
        weight, _ = self.step_weight.compute()
        self.step_weight.reset()
        # Lightning has divided by the micro-batches of a full step, and data parallelism by the ranks.
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / weight.clamp(min=1e-12)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, then let the objective adapt."""
        super().optimizer_step(*args, **kwargs)
        self._stepped = True
        self.adapt()

    def on_train_batch_end(self, outputs: Any, batch: CompletionBatch, batch_idx: int) -> None:
        """Count tokens; at the end of a logging interval report what was seen in it."""
        now = time.perf_counter()
        self.throughput.update((batch.prompt_mask.sum() + batch.completion_mask.sum()).double(), now - self._clock)
        self._clock = now
        if not self._stepped:
            return
        self._stepped = False
        if self.trainer.global_step % self._log_every() == 0:
            self.log_dict(self.train_metrics.compute(), on_step=True, on_epoch=False)
            self.log_dict({f"train/{k}": v for k, v in self.throughput.compute().items()}, on_step=True, on_epoch=False)
            self.train_metrics.reset()
            self.throughput.reset()

    def validation_step(self, batch: CompletionBatch, batch_idx: int) -> None:
        """Add a micro-batch to the validation metrics."""
        loss = self.loss(batch)
        self.val_metrics.update(batch, self._scores, loss)

    def on_validation_epoch_end(self) -> None:
        """Report the validation metrics over all micro-batches and ranks."""
        self.log_dict(self.val_metrics.compute(), on_step=False, on_epoch=True)
        self.val_metrics.reset()
        self._clock = time.perf_counter()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changes: the adapter, adaptive state and metrics, never the base."""
        trained = self._trained_state()
        checkpoint["state_dict"] = {
            key: value
            for key, value in checkpoint["state_dict"].items()
            if not key.startswith("pair.") or key in trained
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not hold the whole adapter.

        Raises:
            UserError: If tensors are missing or have another shape, with the first of them.
        """
        found, trained = checkpoint["state_dict"], self._trained_state()
        own = self.state_dict(keep_vars=True)
        wrong = sorted(key for key in trained if key not in found or found[key].shape != own[key].shape)
        if wrong:
            raise UserError(
                f"the checkpoint does not fit this model: {len(wrong)} of {len(trained)} adapter tensors are missing "
                f"or of another shape, the first is {wrong[0]}; use the model and lora settings it was made with"
            )

    def _trained_state(self) -> set[str]:
        return set() if self.pair is None else {f"pair.{name}" for name in self.pair.state_names()}

    def _planned_steps(self) -> int:
        """Optimizer steps of the run; trainer.estimated_stepping_batches would build and drain a loader."""
        trainer = self.trainer
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            batches: int = trainer.datamodule.train_batches(trainer.world_size)  # type: ignore[attr-defined]
            limit = trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            limits.append(max(1, math.ceil(batches / trainer.accumulate_grad_batches)) * trainer.max_epochs)
        return min(limits) if limits else 1

    def _shows_kl(self) -> bool:
        """KL is for the eye: in validation, and in the optimizer steps whose metrics are written."""
        trainer = self._trainer
        if trainer is None or not trainer.training:
            return True
        return (trainer.global_step + 1) % self._log_every() == 0

    def _log_every(self) -> int:
        return max(1, getattr(self.trainer, "log_every_n_steps", 1))
