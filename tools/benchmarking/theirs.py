"""TRL's DPOTrainer: its own collator, training step, gradient clipping and optimizer."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

from benchmarking.sides import CLIP, Side
from lit_align.data.collate import Group


class Theirs(Side):
    """``trl.DPOTrainer`` at its defaults in float32 on a CPU, LoRA of rank 16 on every linear layer.

    Args:
        model: Folder of the model.
        checkpointing: TRL's default; False keeps the activations.
        compact: Score completion tokens only, as TRL does on GPUs with Triton; elsewhere it scores every position.
    """

    def __init__(self, model: str, checkpointing: bool = True, compact: bool = False) -> None:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = _trainer(model, checkpointing)
        self.compact = compact
        trainer = self.trainer
        trainer.create_optimizer()
        # As Trainer.train does before its first step.
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = self.model
        trainer.create_scheduler(num_training_steps=1000)
        trainer.current_gradient_accumulation_steps = 1

    def step(self, groups: Sequence[Group]) -> None:
        """``training_step`` and what ``Trainer`` does after it."""
        trainer = self.trainer
        inputs = trainer.data_collator(pairs(groups))
        where = "trl.trainer.utils._use_triton"
        with mock.patch(where, return_value=True) if self.compact else contextlib.nullcontext():
            trainer.training_step(self.model, inputs)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()

    def cells(self, groups: Sequence[Group]) -> tuple[int, int]:
        """Of the collated batch; a prompt stands in it once for each completion."""
        mask = self.trainer.data_collator(pairs(groups))["attention_mask"]
        return int(mask.sum()), mask.numel()


def pairs(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The same ids as TRL's rows; a group of more completions becomes pairs of neighbours."""
    return [
        {
            "prompt_ids": group.prompt_ids.tolist(),
            "chosen_ids": group.completion_ids[number].tolist(),
            "rejected_ids": group.completion_ids[number + 1].tolist(),
        }
        for group in groups
        for number in range(0, len(group.completion_ids), 2)
    ]


def _trainer(model: str, checkpointing: bool) -> Any:
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    words = Tokenizer(models.WordLevel({"w0": 0, "w1": 1, "w2": 2, "w3": 3}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    row = {"prompt": "w3", "chosen": " w1", "rejected": " w3"}
    return DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=DPOConfig(
            tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=checkpointing
        ),
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
