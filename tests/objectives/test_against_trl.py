"""Loss and gradient beside TRL 1.16, an implementation that shares no code with this one, on one model and batch.

Named differences: TRL's IPO averages over tokens (our ``length_average``; the paper sums), its DPO knows no label
smoothing, and its ORPO bounds nothing near probability 1.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_align.module import AlignModule
from lit_align.objectives.cpo import cpo_loss
from lit_align.objectives.dpo import DPO
from lit_align.objectives.exo import EXOPref
from lit_align.objectives.ipo import IPO
from lit_align.objectives.orpo import orpo_loss
from lit_align.objectives.robust_dpo import RobustDPO
from lit_align.objectives.simpo import simpo_loss
from lit_align.settings import PairSettings
from tests.families import save_tiny, tiny
from tests.objectives.contract import random_groups

trl = pytest.importorskip("trl")

SAME: dict[str, tuple[type[AlignModule], dict[str, Any], dict[str, Any]]] = {
    "DPO": (DPO, {"beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
    "IPO, averaged": (IPO, {"tau": 0.2, "length_average": True}, {"loss_type": "ipo", "beta": 0.2}),
    "robust DPO": (
        RobustDPO,
        {"beta": 0.3, "label_smoothing": 0.2},
        {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.2},
    ),
    "EXO": (
        EXOPref,
        {"beta": 0.5, "epsilon": 0.01},
        {"loss_type": "exo_pair", "beta": 0.5, "label_smoothing": 0.01},
    ),
}


def theirs(folder: Path, adapter: dict[str, torch.Tensor], options: dict[str, Any]) -> Any:
    """A DPOTrainer on the same tiny model, with the given adapter weights."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(61)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), eos_token="w2", pad_token="w0"
    )
    rows = Dataset.from_list([{"prompt": "w5", "chosen": "w6", "rejected": "w7"}])
    config = trl.DPOConfig(
        str(folder), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, max_length=None, **options
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    trainer = trl.DPOTrainer(
        tiny("llama"), args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora
    )
    named = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, value in adapter.items():
            named[name].copy_(value)
    return trainer


@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient_of_a_batch(name: str, tmp_path: Path) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    objective, ours, options = SAME[name]
    module = objective(pair=PairSettings(save_tiny("llama", tmp_path / "model")), **ours)
    module.configure_model()
    assert module.pair is not None
    torch.manual_seed(0)
    adapter = {n: p for n, p in module.pair.policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in adapter.values():
            parameter.normal_(0, 0.05)
    groups = random_groups(5, 2)
    loss = module.loss(groups)
    (loss.value * loss.weight).sum().div(loss.weight.sum()).backward()

    trainer = theirs(tmp_path / "trl", {n: p.detach() for n, p in adapter.items()}, options)
    examples = [
        {
            "prompt_ids": groups.prompt_ids[b][groups.prompt_mask[b]].tolist(),
            "chosen_ids": groups.completion_ids[b, 0][groups.completion_mask[b, 0]].tolist(),
            "rejected_ids": groups.completion_ids[b, 1][groups.completion_mask[b, 1]].tolist(),
        }
        for b in range(5)
    ]
    found = trainer.compute_loss(trainer.model, DataCollatorForPreference(pad_token_id=0)(examples))
    found.backward()
    torch.testing.assert_close(loss.value.mean(), found, atol=1e-5, rtol=1e-5)
    named = dict(trainer.model.named_parameters())
    for n, parameter in adapter.items():
        torch.testing.assert_close(parameter.grad, named[n].grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=n: f"{n}: {m}")


def test_losses_without_a_reference() -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logps = -torch.rand(16, 2, generator=torch.Generator().manual_seed(0)) * 4 - 0.1
    here = SimpleNamespace(device="cpu")
    shared = {"alpha": 0.0, "label_smoothing": 0.0, "accelerator": here}
    simpo = SimpleNamespace(loss_type="simpo", beta=2.0, simpo_gamma=1.0, **shared)
    torch.testing.assert_close(simpo_loss(logps, 2.0, 1.0), CPOTrainer.cpo_loss(simpo, *logps.unbind(1))[0])
    cpo = SimpleNamespace(loss_type="sigmoid", beta=0.1, **shared)
    # TRL adds the likelihood term elsewhere, so it is left out here
    torch.testing.assert_close(cpo_loss(logps, 0.1, 0.0), CPOTrainer.cpo_loss(cpo, *logps.unbind(1))[0])
    orpo = SimpleNamespace(beta=0.1, accelerator=here)
    penalty = ORPOTrainer.odds_ratio_loss(orpo, *logps.unbind(1))[0]
    torch.testing.assert_close(orpo_loss(logps, 0.1), -logps[:, 0] - penalty)
