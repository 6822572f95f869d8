"""The peak memory of training, and the largest micro-batch a device holds, told before a weight is loaded.

The model is built on PyTorch's meta device, which has shapes and no memory. Reference pass, policy pass and backward
pass are rehearsed there, and the tensors alive are added up; what they hold grows with the number of rows in
proportion, so one and two rows tell of any number. The vocabulary head follows from its chunks. What a CPU's C library
holds beside the tensors, in holes that freed ones leave, is a share of them that was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_align.adapters import POLICY, REFERENCE, START, adapted
from lit_align.batch import CompletionBatch
from lit_align.layout import separate_rows, tree_rows
from lit_align.ledger import register_attention
from lit_align.logprobs import CHUNK_ELEMENTS
from lit_align.models import TREE_FAMILIES, head_of, outline
from lit_align.rehearsal import Pass, walk
from lit_align.settings import PairSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes of a quantized weight: 4 bits, 8 for the scale of each 64, 32 for the scale of 256 such; or 8 bits."""


HOLES = {False: 0.35, True: 1.2}
"""Without and with gradient checkpointing: what glibc holds beside the tensors of the passes, as a share of them, in
holes that small objects keep it from closing. Fitted to runs of several shapes; docs/performance.md has them."""


class Load(NamedTuple):
    """A micro-batch as the forward pass sees it.

    Attributes:
        rows: Rows R.
        length: Tokens N of a row, padding included.
        scored: Completion tokens T.
        masked: Numbers in the attention masks.
    """

    rows: int
    length: int
    scored: int
    masked: int = 0

    def times(self, count: int) -> Load:
        """So many of these."""
        return Load(self.rows * count, self.length, self.scored * count, self.masked * count)


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device, part by part.

    Attributes:
        base: The frozen base, quantized or not.
        adapter: The policy's adapter in float32, its gradient and AdamW's two moments, and a reference's own adapter.
        reference: What the reference's pass needs.
        activations: What the policy's pass keeps for its backward pass.
        head: What the vocabulary head needs on top of these.
        backward: What the backward pass needs on top of these.
        holes: What the C library holds on a CPU beyond the tensors of the passes.
    """

    base: int
    adapter: int
    reference: int
    activations: int
    head: int
    backward: int
    holes: int = 0

    def beside(self, other: Estimate) -> Estimate:
        """Both, where the activations of one are kept while the other is scored."""
        return replace(
            self,
            reference=max(self.reference, self.activations + other.reference),
            activations=self.activations + other.activations,
            head=max(self.head, other.head),
            backward=max(self.backward, other.backward),
            holes=self.holes + other.holes,
        )

    @property
    def held(self) -> int:
        """What is there throughout."""
        return self.base + self.adapter

    @property
    def total(self) -> int:
        """The peak."""
        return self.held + self.passes + self.holes

    @property
    def passes(self) -> int:
        """The tensors of the passes, one after the other, at their peak."""
        return max(self.reference, self.activations + max(self.head, self.backward))

    def parts(self) -> dict[str, int]:
        """The parts of the peak, by name."""
        after = max(self.head, self.backward)
        found = {"base": self.base, "adapter and optimizer": self.adapter}
        if self.reference > self.activations + after:
            found |= {"reference pass": self.reference}
        else:
            last = "vocabulary head" if self.head > self.backward else "backward pass"
            found |= {"activations": self.activations, last: after}
        return found | ({"holes in the heap": self.holes} if self.holes else {})


class Planner:
    """Estimates for one model and its settings.

    Args:
        settings: Model, precision and adapter.
        device: Where it would be loaded; its type alone counts.
        moving: Whether the reference moves, and so has an adapter beside one that stays.

    Raises:
        UserError: If the model's config cannot be read.
    """

    def __init__(self, settings: PairSettings, device: torch.device, moving: bool = False) -> None:
        self.device = device
        base, self.quantization = outline(settings, device, register_attention())
        self.config, self.dtype = base.config, base.dtype
        self.head = head_of(base, settings.temperature)
        self.weights = base_bytes(base, self.quantization)
        largest = max(weight.numel() for weight in matrices(base))
        self.unpacked = 0 if self.quantization == "none" else largest * self.dtype.itemsize
        self.model = _with_adapters(base, settings, moving)
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.train()
        shared = self.config.model_type in TREE_FAMILIES and self.config._attn_implementation != "eager"
        self.apart = shared and device.type == "cpu"
        self.holes = 0.0 if device.type != "cpu" else HOLES[settings.gradient_checkpointing]
        self._walked: dict[tuple[int, int], Pass] = {}

    def estimate(self, load: Load) -> Estimate:
        """The peak of an optimizer step on a micro-batch.

        Args:
            load: The micro-batch.
        """
        one = self._walk(1, load.length)
        found = one if load.rows == 1 else one.along(self._walk(2, load.length), load.rows)
        masks = load.masked * self.dtype.itemsize
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        kept = (f".{REFERENCE}.", f".{START}.")
        frozen = sum(p.nbytes for name, p in self.model.named_parameters() if any(one in name for one in kept))
        tensors = Estimate(
            base=self.weights,
            adapter=4 * trained + frozen,
            reference=found.reference + self.unpacked + masks,
            activations=found.kept + masks,
            head=self._head(load.scored),
            backward=found.backward - found.kept + self.unpacked,
        )
        return replace(tensors, holes=round(self.holes * tensors.passes))

    def together(self, batches: Sequence[CompletionBatch]) -> Estimate:
        """The peak where several batches are scored before one backward pass.

        Args:
            batches: One or more.
        """
        first, *others = (self.estimate(self.load(batch)) for batch in batches)
        for other in others:
            first = first.beside(other)
        return first

    def load(self, batch: CompletionBatch) -> Load:
        """A micro-batch as this model's forward pass sees it."""
        scored = int(batch.completion_mask.sum())
        if self.apart:
            sizes = batch.prompt_mask.sum(-1) + batch.lengths.sum(-1)
            # What is alive grows with the tokens, however they stand in rows.
            return Load(len(sizes), -(-int(sizes.sum()) // len(sizes)), scored, int((sizes**2).sum()))
        trees = self.config.model_type in TREE_FAMILIES
        rows = tree_rows(batch, self.config.get_text_config().hidden_size) if trees else separate_rows(batch)
        height, length = rows.input_ids.shape
        return Load(height, length, scored, height * length**2)

    def largest(self, group: Load, memory: int) -> int:
        """The most groups of a micro-batch that fit.

        Args:
            group: The longest group alone, as many rows as it takes.
            memory: Bytes there are for all of ``Estimate``.

        Returns:
            Groups, 0 if not one fits.
        """

        def fits(count: int) -> bool:
            return self.estimate(group.times(count)).total <= memory

        low, high = 0, 1
        while fits(high):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _head(self, scored: int) -> int:
        """Chunks of both models' logits; hidden states and slopes of log-prob and KL; a float32 copy off the GPU."""
        vocabulary, width = self.head.weight.shape
        cuda = self.device.type == "cuda"
        chunk = 4 * min(CHUNK_ELEMENTS, 2 * scored * vocabulary)
        states = 6 * scored * width * self.dtype.itemsize
        copy = 0 if cuda or self.dtype == torch.float32 else 4 * self.head.weight.numel()
        return (3 * chunk if cuda else chunk) + states + copy

    def _walk(self, rows: int, length: int) -> Pass:
        if (rows, length) not in self._walked:
            self._walked[rows, length] = walk(self.model, rows, length)
        return self._walked[rows, length]


def matrices(model: PreTrainedModel) -> list[Tensor]:
    """The weights that may be quantized and get an adapter: of every linear layer but the head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def base_bytes(model: PreTrainedModel, quantization: str) -> int:
    """Bytes of the frozen weights."""
    every = sum(p.numel() for p in model.parameters())
    if quantization == "none":
        return every * model.dtype.itemsize
    quantized = sum(weight.numel() for weight in matrices(model))
    return round(quantized * WEIGHT_BYTES[quantization]) + (every - quantized) * model.dtype.itemsize


def _with_adapters(base: Any, settings: PairSettings, moving: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    saved = settings.lora.adapter
    if saved is None:
        model = adapted(base, settings)
    else:
        model = get_peft_model(base, LoraConfig.from_pretrained(saved), adapter_name=POLICY)
    for other in (REFERENCE, START) if moving else (REFERENCE,) if saved else ():
        model.add_adapter(other, model.peft_config[POLICY])
    return model
