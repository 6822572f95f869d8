"""Refuse arguments of the data modules that are out of their range."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from lit_align.data.rows import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def at_least(name: str, value: int | None, least: int, remedy: str) -> None:
    """Refuse a number below the least there may be; None is accepted.

    Raises:
        DataError: With the value, the range and the remedy.
    """
    if value is not None and value < least:
        raise DataError(f"data.{name}={value} must be at least {least}: {remedy}")


def check_limits(max_length: int, max_prompt_length: int) -> None:
    """Refuse a prompt budget that leaves completions nothing.

    Raises:
        DataError: Unless 1 <= ``max_prompt_length`` < ``max_length``.
    """
    if not 1 <= max_prompt_length < max_length:
        raise DataError(
            f"data.max_prompt_length={max_prompt_length} must be from 1 to {max_length - 1}, below "
            f"max_length={max_length}, so that completions keep some tokens; leave it out for half of max_length"
        )


def check_shares(validation_size: int | float, max_dropped: float) -> None:
    """Refuse shares that are none.

    Raises:
        DataError: If ``validation_size`` is negative or a fraction of 1 or more, or ``max_dropped`` not in [0, 1].
    """
    if validation_size < 0 or (isinstance(validation_size, float) and validation_size >= 1):
        raise DataError(
            f"data.validation_size={validation_size} must be a share in (0, 1), a whole number of rows from 1, or 0 "
            "for no validation"
        )
    if not 0 <= max_dropped <= 1:
        raise DataError(f"data.max_dropped={max_dropped} must be a share from 0 to 1; 1 accepts any loss")


def check_sampling(temperature: float | None, top_k: int, top_p: float) -> None:
    """Refuse settings nothing can be drawn with.

    Raises:
        DataError: If ``temperature`` is 0 or less, ``top_k`` negative, or ``top_p`` not in (0, 1].
    """
    if temperature is not None and temperature <= 0:
        raise DataError(f"data.temperature={temperature} must be greater than 0; leave it out for the model's own")
    at_least("top_k", top_k, 0, "0 draws from all tokens")
    if not 0 < top_p <= 1:
        raise DataError(f"data.top_p={top_p} must be greater than 0 and at most 1, which draws from all tokens")


def check_sampler(trainer: Any) -> None:
    """Refuse a trainer that would share the data among the ranks once more.

    Raises:
        DataError: With the setting to change.
    """
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise DataError(
            f"use_distributed_sampler=True with {trainer.world_size} ranks would shard the data twice; "
            "the order here is already one per rank, so set Trainer(use_distributed_sampler=False)"
        )


def warn_of_length(max_length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of more tokens than the tokenizer says its model reads."""
    if max_length > tokenizer.model_max_length:
        warnings.warn(
            f"max_length={max_length} is more than the {tokenizer.model_max_length} tokens the "
            f'tokenizer of "{tokenizer.name_or_path}" says its model reads; lower max_length unless it is wrong',
            stacklevel=3,
        )
