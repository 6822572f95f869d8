"""The types every part of lit_align speaks: completions of prompts, their scores, and a loss.

Axes, used in every docstring:

    B   prompts of a micro-batch
    K   completions of one prompt (columns); a preference pair is K = 2, best first
    P   prompt tokens, padded
    L   completion tokens, padded; the end-of-sequence token counts
    T   completion tokens of a micro-batch, without padding
    V   vocabulary

Log-probabilities are natural logarithms (nats).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CompletionBatch(NamedTuple):
    """K completions of each of B prompts; each prompt is held once.

    Attributes:
        prompt_ids: Token ids of the prompts, int64 (B, P).
        prompt_mask: True where ``prompt_ids`` holds a token, bool (B, P).
        completion_ids: Token ids of the completions, end of sequence included, int64 (B, K, L).
        completion_mask: True where ``completion_ids`` holds a token, bool (B, K, L).
        reward: External reward, larger is better, float32 (B, K); columns are sorted best first where it is
            known, unpaired labels are +1 and -1; None where nobody gave one.
        present: False for a column that only pads a group of fewer completions, bool (B, K). An absent
            column is not an empty completion.
        row: Row of each prompt in its source, int64 (B,).
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    reward: Tensor | None
    present: Tensor
    row: Tensor

    @property
    def lengths(self) -> Tensor:
        """Completion tokens |y| of each column, end of sequence included, int64 (B, K)."""
        return self.completion_mask.sum(-1)

    def to(self, device: torch.device | str) -> CompletionBatch:
        """The same batch on another device."""
        return CompletionBatch._make(None if field is None else field.to(device) for field in self)

    def rows(self, index: Tensor | slice) -> CompletionBatch:
        """The groups at some places of the batch, (B',)."""
        return CompletionBatch._make(None if field is None else field[index] for field in self)


class Perturbed(NamedTuple):
    """Log-probs of the completion tokens under the two mixtures of ε-DPO (arXiv 2502.13177).

    Attributes:
        outward: Under softmax((1 + ε) f_policy - ε f_reference), nats (B, K, L).
        inward: Under softmax((1 - ε) f_policy + ε f_reference), nats (B, K, L).
    """

    outward: Tensor
    inward: Tensor


class Scores(NamedTuple):
    """What one pass over the policy, and one over the reference, says of a batch.

    Every field of shape (B, K, L) is 0 at padding. A field that was not asked for is None.

    Attributes:
        token_logps: log π_θ of each completion token, nats (B, K, L); carries gradient.
        reference_token_logps: log π_ref of each completion token, nats (B, K, L).
        perturbed: Log-probs under the mixtures of policy and reference, no gradient.
        token_kl: KL(π_θ ‖ π_ref) over the vocabulary at each position's prefix, nats (B, K, L), >= 0; carries gradient.
        entropy: Entropy of π_θ at each position's prefix, nats (B, K, L), >= 0; carries gradient.
        lengths: Completion tokens of each column, int64 (B, K).
        token_forward_kl: KL(π_ref ‖ π_θ) at each position's prefix, nats (B, K, L), >= 0, no gradient.
        values: A critic's value of prompt and completion before each token, (B, K, L); carries gradient.
    """

    token_logps: Tensor
    reference_token_logps: Tensor | None
    perturbed: Perturbed | None
    token_kl: Tensor | None
    entropy: Tensor | None
    lengths: Tensor
    token_forward_kl: Tensor | None = None
    values: Tensor | None = None

    @property
    def logps(self) -> Tensor:
        """log π_θ(y|x), the sum over completion tokens, nats (B, K)."""
        return self.token_logps.sum(-1)

    @property
    def mean_logps(self) -> Tensor:
        """log π_θ(y|x) / |y|, nats a token (B, K); 0 for an absent column."""
        return self.logps / self.lengths.clamp(min=1)

    @property
    def reference_logps(self) -> Tensor | None:
        """log π_ref(y|x), nats (B, K), or None without a reference pass."""
        return None if self.reference_token_logps is None else self.reference_token_logps.sum(-1)

    @property
    def logratio(self) -> Tensor:
        """log π_θ(y|x) - log π_ref(y|x), nats (B, K).

        Raises:
            ValueError: If the batch was scored with ``reference=False``.
        """
        if self.reference_token_logps is None:
            raise ValueError("the batch was scored with reference=False, so there is no log-ratio")
        # The difference comes first: equal models then give exactly 0, whatever the length.
        return (self.token_logps - self.reference_token_logps).sum(-1)


class Loss(NamedTuple):
    """A loss before reduction.

    Attributes:
        value: The loss of each group (B,), of each completion (B, K), or of each token (B, K, L).
        weight: What each entry counts, same shape as ``value``; 0 leaves it out.
        implicit_reward: β · log-ratio or the method's own implicit reward, detached, (B, K); None if it has none.
        stats: Scalars to log, name -> (), each already detached.
    """

    value: Tensor
    weight: Tensor
    implicit_reward: Tensor | None
    stats: dict[str, Tensor]


class Rollout(NamedTuple):
    """Fresh completions, and what ``annotate`` fixes for them; all per-column fields sort, select and split together.

    Attributes:
        completions: The completions and their rewards.
        old_logps: Token log-probs under the policy that drew them, at its temperature, nats (B, K, L), or None.
        reference_logps: Token log-probs under the reference, nats (B, K, L), or None.
        advantage: (B, K, L) or (B, K, 1), fixed once per buffer, or None.
        old_values: Value estimates when drawn, (B, K, L), or None.
        returns: Targets of the value head, (B, K, L), or None.
        drawn_at: Optimizer steps taken when the group was drawn, int64 (B,), or None for completions of a dataset.
    """

    completions: CompletionBatch
    old_logps: Tensor | None = None
    reference_logps: Tensor | None = None
    advantage: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    drawn_at: Tensor | None = None

    def to(self, device: torch.device | str) -> Rollout:
        """The same rollout on another device."""
        return Rollout._make(None if field is None else field.to(device) for field in self)

    def rows(self, index: Tensor | slice) -> Rollout:
        """The groups at some places, (B',)."""
        rest = [None if field is None else field[index] for field in self[1:]]
        return Rollout._make([self.completions.rows(index), *rest])

    def take(self, groups: Tensor, columns: Tensor) -> Rollout:
        """New groups made of columns of these.

        Args:
            groups: Which group each new one is taken from, int64 (N,).
            columns: Its columns in order, int64 (N, K'); -1 pads a group of fewer.

        Returns:
            N groups of K' columns; a padding column is absent and has no tokens.
        """
        place, there = (groups[:, None], columns.clamp(min=0)), columns >= 0
        old = self.completions
        taken = old.rows(groups)._replace(
            completion_ids=old.completion_ids[place],
            completion_mask=old.completion_mask[place] & there[..., None],
            reward=None if old.reward is None else old.reward[place] * there,
            present=old.present[place] & there,
        )
        per_column = [None if field is None else field[place] for field in self[1:-1]]
        return Rollout._make([taken, *per_column, None if self.drawn_at is None else self.drawn_at[groups]])


class MixedBatch(NamedTuple):
    """A preference minibatch beside samples of the policy, for SPO.

    Attributes:
        preference: The pairs.
        samples: Completions the policy drew at ``samples.drawn_at``, one column each.
    """

    preference: CompletionBatch
    samples: Rollout


Batch = CompletionBatch | Rollout | MixedBatch
"""What a loader may hand to a module."""


def completions_of(batch: Batch) -> CompletionBatch:
    """The completions a loss is taken over: a mixed batch's preferences, a rollout's completions."""
    if isinstance(batch, MixedBatch):
        return batch.preference
    return batch.completions if isinstance(batch, Rollout) else batch


class Sampling(NamedTuple):
    """How completions are drawn.

    Attributes:
        max_new_tokens: Token budget of a completion, > 0; one that reaches it has no end of sequence.
        temperature: Divides the logits, > 0; None draws at the pair's own temperature.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens of at least this mass, in (0, 1]; 1 keeps all.
        seed: Seed of the draw; a completion is a function of it, of its prompt's ``row`` and of its column.
    """

    max_new_tokens: int = 64
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
