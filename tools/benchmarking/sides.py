"""What is compared: our step in its variants, and the matrix products that no step can do without."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarking.work import completion_tokens, distinct_tokens
from lit_align.batch import CompletionBatch
from lit_align.data.collate import Group, collate
from lit_align.logp_files import LogProbFiles
from lit_align.logprobs import CHUNK_ELEMENTS
from lit_align.models import load_base
from lit_align.objectives.dpo import dpo_loss
from lit_align.objectives.eps_dpo import adapted_beta, monotone_step
from lit_align.pair import PolicyReferencePair
from lit_align.settings import PairSettings

BETA = 0.1
CLIP = 1.0
"""Gradient norm both sides clip at by default."""


class Side(ABC):
    """Something that takes optimizer steps on groups."""

    def prepare(self, groups: Sequence[Group]) -> None:  # noqa: B027  most have nothing to do
        """What a step on these finds done; not timed."""

    @abstractmethod
    def step(self, groups: Sequence[Group]) -> None:
        """Forward, reference, backward, clipping, optimizer step."""

    def cells(self, groups: Sequence[Group]) -> tuple[int, int]:
        """Tokens that stand in the rows of the forward pass, and places there are."""
        raise NotImplementedError


class Ours(Side):
    """``PolicyReferencePair.score`` and an objective's loss.

    Args:
        model: Folder of the model.
        epsilon: ε-DPO with this perturbation; None is DPO.
        trees: Whether the completions of a prompt share it.
        kl: Whether the token KL is shown, as in every fifth step of a run with default settings.
        known: Whether the reference cache holds the batch already, or nothing; None goes without a cache.
    """

    def __init__(
        self,
        model: str,
        epsilon: float | None = None,
        trees: bool = True,
        kl: bool = False,
        known: bool | None = None,
    ) -> None:
        self.folder = None if known is None else tempfile.TemporaryDirectory()
        cache = False if self.folder is None else self.folder.name
        self.pair = PolicyReferencePair(PairSettings(model, dtype="float32", reference_cache=cache))
        self.known = known
        self.pair.trees = trees
        self.epsilon, self.kl = epsilon, kl
        self.trained = [parameter for parameter in self.pair.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, weight_decay=0.0)

    def prepare(self, groups: Sequence[Group]) -> None:
        """Fill the reference cache, or empty it."""
        cache = self.pair.known
        if cache is None or self.folder is None:
            return
        assert cache.files is not None  # reads the weights, which a run does once
        if self.known:
            with torch.no_grad():
                self.pair.score(collate(groups), recurring=True)
        else:
            cache._files = LogProbFiles(Path(tempfile.mkdtemp(dir=self.folder.name)))

    def step(self, groups: Sequence[Group]) -> None:
        """One optimizer step on pairs, or on the best and worst of more."""
        self._loss(collate(groups)).mean().backward()
        nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, batch: CompletionBatch) -> Tensor:
        scores = self.pair.score(batch, epsilon=self.epsilon, kl=self.kl, recurring=True)
        # Groups of more than two are so many pairs of neighbours.
        logratio = scores.logratio.view(-1, 2)
        if self.epsilon is None:
            return dpo_loss(logratio, BETA)
        beta = adapted_beta(monotone_step(scores), torch.tensor(BETA, dtype=torch.float64), self.epsilon)
        return dpo_loss(logratio, beta.to(logratio.dtype))

    def cells(self, groups: Sequence[Group]) -> tuple[int, int]:
        """Of the layout in use."""
        before = self.pair.cells.clone()
        with torch.no_grad():
            self.pair.score(collate(groups), reference=False)
        empty, cells = (self.pair.cells - before).tolist()
        return cells - empty, cells


class Limit(Side):
    """The bare matrix products of a step at the model's shapes: 6 N FLOPs a distinct token.

    2 N each for the policy, the reference and the gradient back to the activations; 4 N if the reference is known.

    N are the weights a token is multiplied with: those of the layers for every token, those of the head for tokens
    that are scored. Attention, norms, adapter, softmax and optimizer are not in it, and memory is there beforehand.

    Args:
        model: Folder of the model.
        cached: Whether the reference is known.
        everywhere: Count the head for every token, scored or not.
    """

    def __init__(self, model: str, cached: bool = False, everywhere: bool = False) -> None:
        base = load_base(PairSettings(model, dtype="float32"), torch.device("cpu"))
        head = base.get_output_embeddings()
        self.layers = [one.weight for one in base.modules() if isinstance(one, nn.Linear) and one is not head]
        self.head = head.weight
        self.forwards, self.everywhere = 1 if cached else 2, everywhere
        self._room: dict[int, Tensor] = {}

    def step(self, groups: Sequence[Group]) -> None:
        """The products of one step."""
        with torch.no_grad():
            tokens = distinct_tokens(groups)
            for weight in self.layers:
                self._products(weight, tokens)
            scored = tokens if self.everywhere else completion_tokens(groups)
            size = max(1, CHUNK_ELEMENTS // len(self.head))
            for start in range(0, scored, size):
                self._products(self.head, min(size, scored - start))

    def flops(self, groups: Sequence[Group]) -> int:
        """Of one step."""
        tokens, scored = distinct_tokens(groups), completion_tokens(groups)
        layers = sum(weight.numel() for weight in self.layers) * tokens
        return 2 * (self.forwards + 1) * (layers + self.head.numel() * (tokens if self.everywhere else scored))

    def _products(self, weight: Tensor, tokens: int) -> None:
        outside, inside = weight.shape
        low, high = self._space(0, tokens, inside), self._space(1, tokens, outside)
        for _ in range(self.forwards):
            torch.mm(low, weight.t(), out=high)
        torch.mm(high, weight, out=low)

    def _space(self, which: int, tokens: int, width: int) -> Tensor:
        room = self._room.get(which)
        if room is None or room.numel() < tokens * width:
            room = self._room[which] = torch.full((tokens * width,), 1e-3)
        room = room[: tokens * width]
        return room.view(tokens, width)
