"""Merge an adapter into its base, and measure how far the result is from the policy."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_align.commands.runs import Run
from lit_align.models import load_base, load_tokenizer
from lit_align.settings import PairSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBES = 8
"""Texts whose logits are compared."""
PROBE_TOKENS = 128
TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 5e-2}
"""Largest accepted difference of two logits, as a share of the largest logit, by the coarser type of the two models."""


class Agreement(NamedTuple):
    """How far two models are apart on some tokens.

    Attributes:
        tokens: Positions compared.
        logits: Largest difference of two logits.
        size: Largest logit, in absolute value.
        kl: Mean over positions of KL(policy ‖ merged), nats.
        tolerance: Largest accepted difference of two logits.
    """

    tokens: int
    logits: float
    size: float
    kl: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.logits <= self.tolerance

    def __str__(self) -> str:
        """In a line."""
        return (
            f"on {self.tokens} tokens the logits differ by at most {self.logits:.2g} of {self.size:.3g} "
            f"(accepted: {self.tolerance:.2g}), mean KL(policy || merged) {self.kl:.2g} nats a token"
        )


def merge(run: Run, dtype: str, device: torch.device) -> tuple[PreTrainedModel, Agreement]:
    """The base with the adapter added to its weights, as a plain model of transformers.

    A quantized base is dequantized first, and the adapter added to what it was trained on; adding it to the original
    weights would give another policy, and quantizing again would lose a tenth of it.

    Args:
        run: The adapter and its base.
        dtype: Type of the weights, a name of torch's.
        device: Where it is done; takes twice the memory of the model at most.

    Returns:
        The model, in eval mode with the base's own configuration, and how far it is from the policy.
    """
    texts = _probes(run, load_tokenizer(run.settings))
    policy = _adapted(load_base(run.settings, device), run)
    wanted = _logits(policy, texts)
    held = str(policy.get_base_model().dtype).removeprefix("torch.")
    quantized = getattr(policy.get_base_model().config, "quantization_config", None) is not None
    del policy
    settings = run.settings if quantized else replace(run.settings, dtype=dtype)  # type: ignore[arg-type]
    base = load_base(settings, device)
    if quantized:  # in the type it computes in; the sum with the adapter is not rounded to that if another is wanted
        base = base.dequantize() if dtype == held else base.dequantize().float()
    merged = _adapted(base, run).merge_and_unload().to(getattr(torch, dtype))
    coarser = max((held, dtype), key=TOLERANCE.__getitem__)
    agreement = _agreement(wanted, _logits(merged, texts), TOLERANCE[coarser])
    return _as_published(merged, run.settings), agreement


def _adapted(base: PreTrainedModel, run: Run) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(run.adapter)).eval()


def _probes(run: Run, tokenizer: Any) -> list[Tensor]:
    """Token ids of samples of the run, or where there are none of random tokens."""
    place = run.folder / "samples.jsonl"
    if place.is_file():
        with place.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in islice(file, PROBES)]
        ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"][:PROBE_TOKENS] for row in rows]
        return [torch.tensor([one]) for one in ids if one]
    random = torch.Generator().manual_seed(0)
    return list(torch.randint(len(tokenizer), (PROBES, 1, PROBE_TOKENS // 2), generator=random))


@torch.no_grad()
def _logits(model: Any, texts: list[Tensor]) -> list[Tensor]:
    return [model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu() for ids in texts]


def _agreement(policy: list[Tensor], merged: list[Tensor], share: float) -> Agreement:
    first, second = torch.cat(policy), torch.cat(merged)
    size = first.abs().max().item()
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return Agreement(len(first), (first - second).abs().max().item(), size, max(0.0, kl), share * size)


def _as_published(model: PreTrainedModel, settings: PairSettings) -> PreTrainedModel:
    """With the base's own configuration: training silences dropout and forgets the base's habits of sampling."""
    from transformers import AutoConfig, GenerationConfig

    model.config = AutoConfig.from_pretrained(settings.source, **settings.hub_options())
    model.config.dtype = model.dtype
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with suppress(OSError):  # the base may have none
        revision = settings.revision or "main"
        model.generation_config = GenerationConfig.from_pretrained(settings.source, revision=revision)
    return model
