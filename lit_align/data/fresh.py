"""Draw completions of prompts from the policy and judge them, and choose among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_align.batch import Rollout, Sampling
from lit_align.data.collate import Group, collate
from lit_align.data.judge import RewardFunction, judge
from lit_align.data.loader import TrainingOrder
from lit_align.data.rows import DataError
from lit_align.data.select import Select, all_pairs, best, best_and_worst, ranked
from lit_align.protocols import Learner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CHOICES: dict[str, Callable[[Sequence[float]], Sequence[Sequence[int]]]] = {
    "ranked": lambda rewards: [ranked(rewards)],
    "best": lambda rewards: [[best(rewards)]],
    "best_and_worst": lambda rewards: [pair] if (pair := best_and_worst(rewards)) else [],
    "all_pairs": all_pairs,
}
"""Rewards of a group to the columns of each group it becomes."""

MOST_DRAWS = 8
"""How often prompts are drawn for one buffer before the run is stopped, where rewards fail or do not differ."""


class NothingToLearn(DataError):
    """The completions of a buffer have no rewards that tell them apart."""


def gathered(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def prompt_positions(count: int, seed: int, start: int, number: int) -> list[int]:
    """Some entries of an endless stream of permutations of the prompts, a pure function of its arguments.

    Args:
        count: Prompts there are, >= 1.
        seed: Any integer.
        start: Entries before these.
        number: How many.
    """
    order = TrainingOrder(count, 1, seed)
    found: list[int] = []
    while len(found) < number:
        epoch, offset = divmod(start + len(found), count)
        order.set_epoch(epoch)
        found += order.permutation()[offset : offset + number - len(found)]
    return found


@dataclass
class PromptStream:
    """The prompts of one rank, dealt without end; ranks never share an entry of the stream.

    Attributes:
        groups: The prompts; their completions are ignored.
        seed: Order of the stream.
        rank: This process, in [0, world_size).
        world_size: Processes.
        pad_id: Padding of the batches.
    """

    groups: Sequence[Group]
    seed: int
    rank: int
    world_size: int
    pad_id: int

    def draw(self, learner: Learner, place: int, number: int, completions: int, sampling: Sampling) -> Rollout:
        """Completions of prompts, drawn now.

        Args:
            learner: Draws them.
            place: Prompts this rank has had before, >= 0.
            number: Prompts, >= 1.
            completions: Of each prompt, >= 1.
            sampling: How; its seed is that of the run.
        """
        start, total = place * self.world_size, number * self.world_size
        dealt = prompt_positions(len(self.groups), self.seed, start, total)[self.rank :: self.world_size]
        prompts = collate([self.groups[position]._replace(completion_ids=[]) for position in dealt], self.pad_id)
        # Drawn by the place in the stream, which comes once, and not by the row, which comes again.
        places = torch.arange(start, start + total)[self.rank :: self.world_size]
        drawn = learner.generate(prompts._replace(row=places), completions, sampling).to("cpu")
        return drawn._replace(completions=drawn.completions._replace(row=prompts.row))


@dataclass
class Collector:
    """Fills buffers: draws, judges, annotates, selects.

    Attributes:
        learner: The module.
        stream: The prompts of this rank.
        reward: Judges completions.
        tokenizer: The policy's.
        prompts: Prompts of a buffer on this rank, >= 1.
        completions: Completions of each, >= 1.
        sampling: How they are drawn.
        select: Which of them are learned from.
        least: Groups that must be left on this rank, >= 1.
    """

    learner: Learner
    stream: PromptStream
    reward: RewardFunction
    tokenizer: PreTrainedTokenizerBase
    prompts: int
    completions: int
    sampling: Sampling
    select: Select
    least: int

    def collect(self, place: int) -> tuple[Rollout, int]:
        """A fresh buffer.

        Where too few of its groups can be learned from, since rewards fail or do not differ, it is drawn again from
        the prompts that follow.

        Args:
            place: Prompts this rank has had before.

        Returns:
            The buffer as it is learned from, and the prompts this rank has now had.

        Raises:
            NothingToLearn: If that does not help, on every rank as soon as it is so on one.
        """
        judged, place = self._judged(place)
        enough = len(chosen(judged, self.select)[0]) >= self.least
        if not all(gathered(enough)):
            raise NothingToLearn(
                f"{MOST_DRAWS} times in a row fewer than {self.least} of {self.prompts} prompts had completions that "
                f"could be learned from with data.select={self.select}: their rewards failed or were all equal; take a "
                "reward that tells completions apart, more data.completions, or a higher data.temperature"
            )
        rollout = self.learner.annotate(judged)
        return rollout.to("cpu").take(*chosen(rollout, self.select)), place

    def _judged(self, place: int) -> tuple[Rollout, int]:
        """Completions with rewards, of which enough can be learned from if that could be had."""
        for _ in range(MOST_DRAWS):
            begin = time.perf_counter()
            rollout = self.stream.draw(self.learner, place, self.prompts, self.completions, self.sampling)
            place += self.prompts
            judged = with_rewards(rollout, judge(self.reward, rollout.completions, self.tokenizer))
            self.learner.observe(judged, time.perf_counter() - begin)
            if len(chosen(judged, self.select)[0]) >= self.least:
                break
        return judged, place


def with_rewards(rollout: Rollout, rewards: Tensor) -> Rollout:
    """A rollout with its rewards.

    Args:
        rollout: B groups of K completions.
        rewards: (B, K); NaN throughout a group leaves it without a present column.
    """
    sound = ~rewards.isnan()
    batch = rollout.completions._replace(reward=rewards.nan_to_num(0.0), present=rollout.completions.present & sound)
    return rollout._replace(completions=batch)


def chosen(rollout: Rollout, select: Select) -> tuple[Tensor, Tensor]:
    """The groups that are learned from, for ``Rollout.take``.

    Args:
        rollout: With rewards; groups without a present column are left out.
        select: How a group's completions are chosen by their rewards.

    Returns:
        Group (N,) and columns (N, K'), best first, both int64.
    """
    batch = rollout.completions
    assert batch.reward is not None
    found = [
        (group, list(columns))
        for group, (rewards, there) in enumerate(
            zip(batch.reward.tolist(), batch.present.any(-1).tolist(), strict=True)
        )
        if there
        for columns in CHOICES[select](rewards)
    ]
    groups = torch.tensor([group for group, _ in found], dtype=torch.int64)
    columns = torch.tensor([columns for _, columns in found], dtype=torch.int64)
    return groups, columns.view(len(found), -1) if found else torch.empty(0, 1, dtype=torch.int64)
