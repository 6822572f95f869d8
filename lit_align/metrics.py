"""What an optimizer step shows: torchmetrics that add up over micro-batches, ranks and resumed runs.

Every class keeps plain sums as persistent states and computes a dict of named values; a name without data is left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lit_align.batch import CompletionBatch, Loss, Scores


class Total(Metric):
    """Sum and number of values over micro-batches and ranks, in float64: what adaptive state is computed from.

    Not part of a checkpoint: a step cut short there begins again, and so must its sums.
    """

    full_state_update = False
    sum: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values of any shape; no gradient is kept."""
        self.sum = self.sum + values.detach().double().sum()
        self.count = self.count + values.numel()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Sum and number, () each, over all ranks."""
        return self.sum, self.count


class SumMetric(Metric, ABC):
    """Sums of named quantities, each with its own count; a subclass says what one micro-batch adds.

    Args:
        names: The quantities, in the order they are reported.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        zeros = torch.zeros(len(self.names), dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum", persistent=True)
        self.add_state("count", zeros.clone(), dist_reduce_fx="sum", persistent=True)

    @abstractmethod
    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add what was seen; the metrics of ``standard_metrics`` take (batch, scores, loss) of a micro-batch."""

    def compute(self) -> dict[str, Tensor]:
        """The mean of each quantity that was seen, name -> ()."""
        return {name: (self.total[i] / self.count[i]).float() for i, name in enumerate(self.names) if self.count[i] > 0}

    def _add(self, name: str, values: Tensor, weight: Tensor | None = None) -> None:
        values = values.detach().to(self.total.dtype)
        weight = torch.ones_like(values) if weight is None else weight.to(values)
        # Never in place: processes started with a copy of the module may share these tensors' memory.
        at = torch.zeros_like(self.total)
        at[self.names.index(name)] = 1
        self.total = self.total + at * (values * weight).sum()
        self.count = self.count + at * weight.sum()


class MeanLoss(SumMetric):
    """The weighted mean of the loss; ``loss``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(["loss"], **kwargs)

    def update(self, batch: CompletionBatch, scores: Scores | None, loss: Loss) -> None:
        """Add one micro-batch."""
        self._add("loss", loss.value, loss.weight)


class ImplicitRewards(SumMetric):
    """Implicit rewards of the best and the worst completion of each group, their margin and how often it is positive.

    Names: ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``, where a tie counts ½.
    A single implicit reward of a group with a label of +1 or -1 (unpaired data) counts as chosen or rejected; the
    margin is then the difference of their means. Other groups of one completion are left out.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__([f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")], **kwargs)

    def update(self, batch: CompletionBatch, scores: Scores | None, loss: Loss) -> None:
        """Add one micro-batch."""
        if loss.implicit_reward is None:
            return
        best, worst = chosen_and_rejected(loss.implicit_reward, batch, loss)
        self._add("rewards/chosen", best)
        self._add("rewards/rejected", worst)
        if not unpaired(batch, loss):
            self._add("rewards/margins", best - worst)
            self._add("rewards/accuracies", 0.5 + 0.5 * (best - worst).sign())

    def compute(self) -> dict[str, Tensor]:
        """The means; for unpaired data the margin of the means."""
        found = super().compute()
        chosen, rejected = found.get("rewards/chosen"), found.get("rewards/rejected")
        if chosen is not None and rejected is not None and "rewards/margins" not in found:
            found["rewards/margins"] = chosen - rejected
        return found


class LogProbs(SumMetric):
    """Log-probs and lengths of the best and the worst completion, free of β.

    Names: ``logps/chosen``, ``logps/rejected``, ``logratio/chosen`` (how far the chosen completion was displaced),
    ``logratio_margin``, ``lengths/chosen``, ``lengths/rejected``.
    """

    def __init__(self, **kwargs: Any) -> None:
        names = ["logps/chosen", "logps/rejected", "logratio/chosen", "logratio_margin"]
        super().__init__([*names, "lengths/chosen", "lengths/rejected"], **kwargs)

    def update(self, batch: CompletionBatch, scores: Scores | None, loss: Loss) -> None:
        """Add one micro-batch."""
        if scores is None:
            return
        pairs = [("logps", scores.logps), ("lengths", scores.lengths)]
        for name, values in pairs:
            best, worst = chosen_and_rejected(values, batch, loss)
            self._add(f"{name}/chosen", best)
            self._add(f"{name}/rejected", worst)
        if scores.reference_token_logps is not None:
            best, worst = chosen_and_rejected(scores.logratio, batch, loss)
            self._add("logratio/chosen", best)
            if not unpaired(batch, loss):
                self._add("logratio_margin", best - worst)


class Divergence(SumMetric):
    """Divergence along the completions at hand, nats a completion, both ways.

    Names: ``kl``, which is KL(π_θ ‖ π_ref), and ``forward_kl``, which is KL(π_ref ‖ π_θ).

    At each position the divergence is exact over the vocabulary; the prefixes are those of the data, so it estimates
    the policy's own KL only on completions the policy drew.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(["kl", "forward_kl"], **kwargs)

    def update(self, batch: CompletionBatch, scores: Scores | None, loss: Loss) -> None:
        """Add one micro-batch."""
        if scores is None:
            return
        columns = 1 if unpaired(batch, loss) else batch.present.shape[1]
        for name, values in (("kl", scores.token_kl), ("forward_kl", scores.token_forward_kl)):
            if values is not None:
                self._add(name, values.sum(-1)[:, :columns], batch.present[:, :columns])


class StatMeans(SumMetric):
    """Means of the scalars an objective reports in ``Loss.stats``, each micro-batch by its weight.

    Args:
        names: The scalars the objective reports, such as ``beta``.
    """

    def update(self, batch: CompletionBatch, scores: Scores | None, loss: Loss) -> None:
        """Add one micro-batch."""
        for name in self.names:
            if name in loss.stats:
                self._add(name, loss.stats[name], loss.weight.sum())


class Throughput(Metric):
    """Tokens a second: of training, prompts and completions counted once, or of drawing; ``tokens_per_second``."""

    full_state_update = False
    tokens: Tensor
    seconds: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("seconds", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max", persistent=True)

    def update(self, tokens: Tensor | int, seconds: float) -> None:
        """Add the tokens of a stretch of training and how long it took."""
        self.tokens = self.tokens + tokens
        self.seconds = self.seconds + seconds

    def compute(self) -> dict[str, Tensor]:
        """Tokens of all ranks over the seconds of the slowest."""
        return {"tokens_per_second": (self.tokens / self.seconds).float()} if self.seconds > 0 else {}


def unpaired(batch: CompletionBatch, loss: Loss) -> bool:
    """Whether each group is one labelled completion: a single implicit reward, and a label of +1 or -1.

    Further columns, such as the mismatched completions KTO reads, are then no part of the group.
    """
    return loss.implicit_reward is not None and loss.implicit_reward.shape[1] == 1 and batch.reward is not None


def chosen_and_rejected(values: Tensor, batch: CompletionBatch, loss: Loss) -> tuple[Tensor, Tensor]:
    """Values of the good and of the bad completions of unpaired data; else of the best and the worst of each group.

    Args:
        values: One value per completion, (B, K).
        batch: The groups.
        loss: The loss of the groups.
    """
    if not unpaired(batch, loss):
        return best_and_worst(values, batch)
    assert batch.reward is not None
    good = batch.reward[:, 0] > 0
    return values[good, 0], values[~good, 0]


def best_and_worst(values: Tensor, batch: CompletionBatch) -> tuple[Tensor, Tensor]:
    """First and last present column of each group that has at least two, not all of one reward.

    Args:
        values: One value per completion, best completion first, (B, K).
        batch: The groups.

    Returns:
        Two tensors (B',), B' the groups with two or more completions that differ.
    """
    count = batch.present.sum(-1)
    last = (count.clamp(min=1) - 1)[:, None]
    keep = count > 1
    if batch.reward is not None:
        keep = keep & (batch.reward[:, 0] != batch.reward.gather(1, last)[:, 0])
    return values[keep, 0], values.gather(1, last)[keep, 0]


def standard_metrics(stats: Sequence[str] = ()) -> MetricCollection:
    """What every objective reports, and the scalars its own ``Loss.stats`` holds."""
    metrics: list[Metric] = [MeanLoss(), ImplicitRewards(), LogProbs(), Divergence()]
    if stats:
        metrics.append(StatMeans(stats))
    return MetricCollection(metrics, compute_groups=False)
