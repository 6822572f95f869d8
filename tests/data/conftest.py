"""Small tokenizers whose ids can be worked out by hand: one token for each byte, and the special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_align.batch import CompletionBatch
from lit_align.data.completions import CompletionData

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes how many messages there are at the very beginning, so a prompt is never the beginning of the whole.
COUNTING = "{{ messages | length }} messages\n" + CHATML
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(
    template: str | None = None, eos: str | None = "</s>", post: str | None = None, **options: Any
) -> PreTrainedTokenizerFast:
    """One token for each byte. ``post`` is what the tokenizer writes around a text, such as "<s> $A"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: number for number, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    if post is not None:
        numbers = [(token, tokenizer.token_to_id(token)) for token in SPECIALS]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=numbers)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=template, **options)


def spaced_tokenizer(normalizes: bool = False) -> PreTrainedTokenizerFast:
    """One token for each letter, with the "▁" that Llama 2 puts before the first word of any text.

    Files of the tokenizer do it in either of two ways: newer ones split words so, and put none before a word that
    has a space; older ones, such as Mistral's, write it before the text, whatever that begins with.
    """
    signs = ["▁", "\n", *"aHelo? Q", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={sign: number for number, sign in enumerate(signs)}, merges=[]))
    if normalizes:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair_rows(count: int) -> list[dict[str, str]]:
    """Distinct prompts with a chosen and a rejected completion of different lengths."""
    return [{"prompt": f"Q{n:03d}", "chosen": f" yes{'!' * (n % 5)}", "rejected": " no"} for n in range(count)]


def texts_of(batch: CompletionBatch) -> list[list[str]]:
    """The completions of each group that are present, by a byte tokenizer."""
    tokenizer = byte_tokenizer()
    return [
        [
            tokenizer.decode(ids[mask])
            for ids, mask, there in zip(*columns, strict=True)
            if there or mask.any()  # an absent column that holds a token would show
        ]
        for columns in zip(batch.completion_ids, batch.completion_mask, batch.present, strict=True)
    ]


def everything(data: CompletionData) -> CompletionBatch:
    """All validation groups in one batch, in the order of the source."""
    (batch,) = data.val_dataloader()
    return batch


def validating(kind: type[CompletionData], path: Path, rows: list[Any], **options: Any) -> CompletionData:
    """Rows read as a validation dataset, which keeps their order, and as a training dataset."""
    source = str(write_jsonl(path / "rows.jsonl", rows))
    data = kind(source, validation_dataset=source, validation_batch_size=1000, **options)
    data.load(byte_tokenizer())
    return data


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()
