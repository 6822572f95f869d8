"""Pairs beside samples of the policy, and SPO on a tiny model, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_align.batch import CompletionBatch, MixedBatch, Rollout
from lit_align.objectives.spo import SPO
from lit_align.settings import OptimSettings, PairSettings
from tests.data.conftest import byte_tokenizer
from tests.families import save_tiny
from tests.objectives.contract import random_groups

OPTIM = OptimSettings(learning_rate=1e-3, warmup=0.0, schedule="constant")


class Beside(NamedTuple):
    """Pairs, and twice as many samples, cut together."""

    pairs: CompletionBatch
    samples: Rollout
    reward: None = None

    def rows(self, index: slice) -> MixedBatch:
        return MixedBatch(self.pairs.rows(index), self.samples.rows(slice(2 * index.start, 2 * index.stop)))


def mixed(pairs: int) -> Beside:
    return Beside(random_groups(pairs, 2), Rollout(random_groups(2 * pairs, 1, seed=5)))


def byte_model(folder: Path) -> str:
    """A random Llama over the bytes, and its tokenizer, on disk."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    return save_tiny("llama", folder, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)


def build(model: str, disturb: float = 0.0, **options: Any) -> SPO:
    """SPO on a model, its policy away from the reference by random factors."""
    module = SPO(pair=PairSettings(model), optim=OPTIM, **options)
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and (disturb or "lora_A" in name):
            torch.nn.init.normal_(parameter, 0.0, disturb or 0.2, generator=generator)
    return module
