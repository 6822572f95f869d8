"""Attention of each group apart, for CPUs, whose kernels work through a mask whether it lets anything pass or not.

All groups of a batch then stand in one row without padding. The layers read them together, and attention takes them one
by one, each with a mask of its own. The masks travel on a tensor of one element, which transformers hands through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BY_GROUP = "by_group"
"""Name of ``by_group`` among transformers' attention functions, once it is registered."""


def register_by_group() -> str:
    """Make ``by_group`` known to transformers, and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(BY_GROUP, by_group)
    AttentionMaskInterface.register(BY_GROUP, sdpa_mask)
    return BY_GROUP


def carrier(masks: Sequence[Tensor]) -> Tensor:
    """What stands for the masks of all groups in the call of a model.

    Args:
        masks: For each group in order what is added to its scores, (1, 1, n, n).
    """
    found = torch.zeros(1, 1, 1, 1, dtype=masks[0].dtype, device=masks[0].device)
    of_one_size = len({mask.shape for mask in masks}) == 1
    # Groups of one size take one call, which for short ones is longer in the making than at work.
    found.groups = [torch.cat(list(masks))] if of_one_size else list(masks)  # type: ignore[attr-defined]
    return found


def by_group(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention within each group of one row; with a mask of any other kind that of ``sdpa``.

    Args:
        module: The attention layer.
        query: (1, heads, N, d), the groups one after the other.
        key: (1, key heads, N, d).
        value: (1, key heads, N, d).
        attention_mask: From ``carrier``, or as ``sdpa`` takes it.
        options: As ``sdpa`` takes them.

    Returns:
        The output, (1, N, heads, d), and no weights.

    Raises:
        RuntimeError: If the mask has one element for several keys and no groups, as a copy of a ``carrier`` would.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    masks = getattr(attention_mask, "groups", None)
    if masks is None:
        if attention_mask is not None and attention_mask.shape[-1] == 1 < key.shape[2]:
            # Spread over all keys it would let every group see every other, and nothing would show it.
            raise RuntimeError("the masks of the groups were lost on their way to the attention layer")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if len(masks) == 1:
        mask = masks[0]
        query, key, value = (one.unflatten(2, (len(mask), -1))[0].transpose(0, 1) for one in (query, key, value))
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0].flatten(0, 1)[None], None
    sizes = [mask.shape[-1] for mask in masks]
    parts = zip(*(states.split(sizes, 2) for states in (query, key, value)), masks, strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, m, **options)[0] for q, k, v, m in parts], 1), None
