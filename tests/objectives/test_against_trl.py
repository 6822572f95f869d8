"""Loss and gradient beside TRL 1.16, an implementation that shares no code with this one, on one model and batch.

Named differences: TRL's IPO averages over tokens (our ``length_average``; the paper sums), its DPO knows no label
smoothing, its TR-DPO refuses LoRA, and its CPO and ORPO add the likelihood term elsewhere. SFT is compared with the
cross-entropy of transformers, which TRL uses, in its own test.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_align.batch import CompletionBatch
from lit_align.data.collate import Group
from lit_align.data.unpaired import collate_unpaired
from lit_align.module import AlignModule
from lit_align.objectives.cpo import cpo_loss
from lit_align.objectives.dpo import DPO
from lit_align.objectives.exo import EXOPref
from lit_align.objectives.ipo import IPO
from lit_align.objectives.kto import KTO
from lit_align.objectives.orpo import orpo_loss
from lit_align.objectives.reward_model import reward_model_loss
from lit_align.objectives.robust_dpo import RobustDPO
from lit_align.objectives.simpo import simpo_loss
from lit_align.objectives.tr_dpo import TRDPO
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


PAIR = ("prompt", "chosen", "rejected")


def theirs(kind: str, folder: Path, adapter: dict[str, torch.Tensor], row: dict[str, Any], **options: Any) -> Any:
    """A trainer of TRL on the same tiny model, with the given adapter weights."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(61)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), eos_token="w2", pad_token="w0"
    )
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False, "max_length": None}
    trainer = getattr(trl, f"{kind}Trainer")(
        tiny("llama"),
        args=getattr(trl, f"{kind}Config")(str(folder), **quiet, **options),
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
    named = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, value in adapter.items():
            named[name].copy_(value)
    return trainer


def ours(
    objective: type[AlignModule], folder: Path, **options: Any
) -> tuple[AlignModule, dict[str, torch.nn.Parameter]]:
    """Our module on the tiny model with a disturbed adapter, and the adapter's tensors."""
    module = objective(pair=PairSettings(save_tiny("llama", folder)), **options)
    module.configure_model()
    assert module.pair is not None
    adapter = {n: p for n, p in module.pair.policy.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.values():
            parameter.normal_(0, 0.05)
    return module, adapter


def assert_same_gradient(adapter: dict[str, torch.nn.Parameter], trainer: Any) -> None:
    named = dict(trainer.model.named_parameters())
    for n, parameter in adapter.items():
        torch.testing.assert_close(parameter.grad, named[n].grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=n: f"{n}: {m}")


def tokens(batch: CompletionBatch, b: int, k: int) -> tuple[list[int], list[int]]:
    prompt = batch.prompt_ids[b][batch.prompt_mask[b]].tolist()
    return prompt, batch.completion_ids[b, k][batch.completion_mask[b, k]].tolist()


@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient_of_a_batch(name: str, tmp_path: Path) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    objective, options, their_options = SAME[name]
    module, adapter = ours(objective, tmp_path / "model", **options)
    groups = random_groups(5, 2)
    loss = module.loss(groups)
    (loss.value * loss.weight).sum().div(loss.weight.sum()).backward()

    trainer = theirs(
        "DPO", tmp_path / "trl", adapter, dict(zip(PAIR, ("w5", "w6", "w7"), strict=True)), **their_options
    )
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [(*tokens(groups, b, 0), tokens(groups, b, 1)[1]) for b in range(5)]
    examples = [dict(zip(names, row, strict=True)) for row in rows]
    found = trainer.compute_loss(trainer.model, DataCollatorForPreference(pad_token_id=0)(examples))
    found.backward()
    torch.testing.assert_close(loss.value.mean(), found, atol=1e-5, rtol=1e-5)
    assert_same_gradient(adapter, trainer)


def padded(rows: list[tuple[list[int], list[int]]], prefix: str = "") -> dict[str, torch.Tensor]:
    """Prompt and completion of each row in TRL's names for unpaired data."""
    from torch.nn.utils.rnn import pad_sequence

    def stack(values: list[list[int]]) -> torch.Tensor:
        return pad_sequence([torch.tensor(value) for value in values], batch_first=True)

    return {
        f"{prefix}input_ids": stack([p + c for p, c in rows]),
        f"{prefix}attention_mask": stack([[1] * len(p + c) for p, c in rows]),
        f"{prefix}completion_mask": stack([[0] * len(p) + [1] * len(c) for p, c in rows]),
    }


def test_kto(tmp_path: Path) -> None:
    module, adapter = ours(KTO, tmp_path / "model", beta=0.4, good_weight=1.5, bad_weight=0.5)
    source = random_groups(4, 1)
    rows = [tokens(source, b, 0) for b in range(4)]
    labels = [True, False, False, True]
    groups = [
        Group(b, torch.tensor(p), [torch.tensor(c)], [1.0 if label else -1.0])
        for b, ((p, c), label) in enumerate(zip(rows, labels, strict=True))
    ]
    loss = module.loss(collate_unpaired(groups, max_total=64))
    loss.value.mean().backward()

    options = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    row = {"prompt": "w5", "completion": "w6", "label": True}
    trainer = theirs("KTO", tmp_path / "trl", adapter, row, per_device_train_batch_size=2, **options)
    mismatched = [(prompt, rows[(b + 1) % 4][1]) for b, (prompt, _) in enumerate(rows)]
    batch = {**padded(rows), **padded(mismatched, "KL_"), "label": torch.tensor(labels)}
    found = trainer._compute_loss(trainer.model, batch, False)
    found.backward()
    torch.testing.assert_close(loss.value.mean(), found, atol=1e-5, rtol=1e-5)
    assert_same_gradient(adapter, trainer)


def test_reward_model() -> None:
    rewards = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    present = torch.ones(8, 2, dtype=torch.bool)
    mine = reward_model_loss(rewards, torch.tensor([[1.0, 0.0]]).expand(8, 2), present, 0.01).mean()
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=0.01),
        accelerator=accelerator,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    outputs = SimpleNamespace(logits=torch.cat([rewards[:, 0], rewards[:, 1]])[:, None])
    inputs = {"attention_mask": torch.ones(16, 3)}
    found = trl.RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
    torch.testing.assert_close(mine, found)


def test_tr_dpo_averages_as_trl_does_for_whole_weights(tmp_path: Path) -> None:
    """TRL refuses LoRA here, so the weights an adapter stands for, B·A, are given to it as dense layers."""
    from trl.trainer.callbacks import SyncRefModelCallback

    module = TRDPO(alpha=0.3, pair=PairSettings(save_tiny("llama", tmp_path)))
    module.configure_model()
    pair = module.pair
    assert pair is not None

    def dense(adapter: str) -> torch.nn.ParameterList:
        state = pair.state_dict()
        names = [name for name in state if f"lora_A.{adapter}" in name]
        return torch.nn.ParameterList([state[n.replace("lora_A", "lora_B")] @ state[n] for n in names])

    torch.manual_seed(0)
    for _ in range(2):
        with torch.no_grad():
            for parameter in pair.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1)
        policy, expected = dense("default"), dense("reference")
        SyncRefModelCallback._sync_target_model(policy, expected, 0.3)
        pair.update_reference(0.3)
        for found, value in zip(dense("reference"), expected, strict=True):
            torch.testing.assert_close(found, value)


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
