"""What a user sets for every objective: the model, its adapter, the optimizer. Loads no model and no library for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from lit_align.assets import resolve
from lit_align.errors import UserError


def check(name: str, value: float, holds: bool, accepted: str, usual: str) -> None:
    """Refuse a hyperparameter out of range.

    Raises:
        UserError: If ``holds`` is false, with the name, the value, what is accepted and a usual value.
    """
    if not holds:
        raise UserError(f"{name} is {value}; it must be {accepted} ({usual} is usual)")


def check_cacheable(dtype: str, quantization: str) -> None:
    """Refuse to keep log-probs that depend on what else is in their batch.

    Raises:
        UserError: If the model computes in 16 bits or its weights are held in 8.
    """
    if dtype == "bfloat16" or quantization == "int8":
        found = "dtype bfloat16" if dtype == "bfloat16" else "quantization int8"
        raise UserError(
            f"model.pair.reference_cache does not go with {found}: a token's log-prob then moves by up to tenths of a "
            "nat with what else is in the batch, which only cancels where both models score the same one. Set "
            "model.pair.dtype=float32 with quantization none or nf4, or leave the cache out"
        )


@dataclass(frozen=True)
class LoraSettings:
    """The trained adapter.

    Attributes:
        r: Rank, >= 1.
        alpha: The update is scaled by alpha / r, > 0.
        target_modules: Names of the linear layers that get an adapter, or "all-linear" (never the output head).
        adapter: A saved adapter to start from, such as the result of supervised fine-tuning. It is then the
            reference as well, frozen; ``r``, ``alpha`` and ``target_modules`` come from it.
    """

    r: int = 16
    alpha: int = 32
    target_modules: str | list[str] = "all-linear"
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"model.pair.lora.r is {self.r}; it must be 1 or more (16 is usual)")
        if self.alpha <= 0:
            raise UserError(
                f"model.pair.lora.alpha is {self.alpha}; it must be greater than 0 (twice the rank is usual)"
            )


@dataclass(frozen=True)
class PairSettings:
    """Which model is trained against itself, and how it is held in memory.

    Attributes:
        model: Local folder or Hub name of a causal language model, or "stories", the small model that comes along.
        dtype: Type of the base's weights and computations; "auto" is bfloat16 on a GPU and float32 on a CPU.
        quantization: "nf4" or "int8" by bitsandbytes, or "none"; "auto" is nf4 on a GPU for models of more than 100
            million parameters and none elsewhere.
        lora: The adapter.
        temperature: Divides the logits of both models in training, sampling and KL alike, > 0.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        reference_cache: Keep the reference's log-probs on disk, where every run with the same reference finds them and
            skips its pass: True in ``~/.cache/lit_align`` or where LIT_ALIGN_CACHE says, or a folder. In float32 only.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run Python code that comes with the model; needs a pinned ``revision``.
    """

    model: str = "stories"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["auto", "none", "nf4", "int8"] = "auto"
    lora: LoraSettings = LoraSettings()
    temperature: float = 1.0
    gradient_checkpointing: bool = False
    reference_cache: bool | str = False
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"model.pair.temperature is {self.temperature}; it must be greater than 0 (1 is usual)")
        if self.reference_cache:
            check_cacheable(self.dtype, self.quantization)
        if self.trust_remote_code and not self.revision:
            raise UserError(
                "model.pair.trust_remote_code runs code from the model's repository, so it needs a fixed version: "
                "set model.pair.revision to a commit hash"
            )
        if self.quantization in {"nf4", "int8"} and find_spec("bitsandbytes") is None:
            raise UserError(
                f"model.pair.quantization is {self.quantization}, which needs bitsandbytes, and that is not installed: "
                "`pip install bitsandbytes`, or set model.pair.quantization=none"
            )

    @property
    def source(self) -> str:
        """What transformers loads from: a folder or a Hub name."""
        return resolve(self.model)

    def hub_options(self) -> dict[str, Any]:
        """Keyword arguments of every ``from_pretrained`` call."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class OptimSettings:
    """AdamW on the adapter.

    Attributes:
        learning_rate: Peak step size, > 0; None follows the model's size, see ``usual_learning_rate``.
        weight_decay: Decoupled weight decay, >= 0.
        warmup: Share of the run over which the step size rises from 0, in [0, 1).
        schedule: How it falls after that: "constant", "linear" or "cosine", the last two to 0.
    """

    learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    schedule: Literal["constant", "linear", "cosine"] = "cosine"

    def __post_init__(self) -> None:
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        check("model.optim.learning_rate", rate, rate > 0, "greater than 0, or left out", "1e-4")
        check("model.optim.weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more", "0")
        check("model.optim.warmup", self.warmup, 0 <= self.warmup < 1, "in [0, 1), a share of the run", "0.1")

    def factor(self, step: int, total: int) -> float:
        """Multiplier of the peak step size at optimizer step ``step`` of ``total``, in [0, 1]."""
        warm = math.ceil(self.warmup * total)
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warm) / max(1, total - warm))
        return 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def usual_learning_rate(parameters: int) -> float:
    """A peak step size for LoRA that suits small models and large ones, the same for every objective.

        1e-4 · sqrt(1e9 / parameters), kept between 1e-4 and 5e-4

    Args:
        parameters: Parameters of the base model, > 0.

    Returns:
        5e-4 up to 40 million parameters, 1.4e-4 for 0.5 billion, 1e-4 from one billion. A rule of thumb of this
        project, not of any paper.
    """
    return min(5e-4, max(1e-4, 1e-4 * math.sqrt(1e9 / parameters)))
