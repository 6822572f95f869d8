"""The decisions of ε-DPO on training pairs after a run: how they fall, in which precision, and with which margins.

In exact arithmetic a tie has probability 0 once policy and reference differ. Logits of 16 bits round a change of a
hundredth away, and what is left of it is lost in the sum over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from eps_dpo_arms import PRECISIONS, QUANTILES
from torch import Tensor

from lit_align.batch import CompletionBatch, Scores
from lit_align.commands.arguments import Loading
from lit_align.commands.evaluate import data_of
from lit_align.commands.runs import Run, find_run, load, opened
from lit_align.objectives.eps_dpo import monotone_step
from lit_align.pair import PolicyReferencePair

AT_ONCE = 16
DIRECTIONS = {"+1": 1, "-1": -1}


def decisions(folder: Path, epsilon: float, number: int) -> dict[str, float]:
    """How the decisions fall in each precision, and margins by direction.

    Args:
        folder: A run folder.
        epsilon: ε of the decisions.
        number: Training pairs, the first distinct prompts.

    Returns:
        ``SHARE, PRECISION`` for the names of ``shares``; and in float32, for D in +1 and -1, ``margin of D pairs``, the
        mean of M_w - M_l in nats, and ``D quantile Q`` of the same.

    Raises:
        ValueError: If no pair goes in one of the directions.
    """
    run = find_run(str(folder))
    found: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        ready = opened(run, Loading(dtype=dtype, quantization="none"))
        loaded, pairs = load(ready), training_pairs(run, ready.tokenizer, number)
        parts = [part.to(loaded.device) for part in cut(pairs)]
        with torch.no_grad():
            scores = [loaded.pair.score(part, epsilon=epsilon) for part in parts]
            changes = torch.cat([scored_changes(one) for one in scores]).cpu()
            if dtype == "float32":
                gaps = torch.cat([one.logratio[:, 0] - one.logratio[:, 1] for one in scores]).cpu()
                steps = torch.cat([monotone_step(one) for one in scores]).cpu()
                found |= margins(steps, gaps) | shares(changes, PRECISIONS[0])
            else:
                found |= shares(changes, PRECISIONS[1])
                for name, after in zip(PRECISIONS[2:], (torch.float32, torch.bfloat16), strict=True):
                    rounded = [rounded_changes(loaded.pair, part, epsilon, after) for part in parts]
                    found |= shares(torch.cat(rounded).cpu(), name)
    return found


def scored_changes(scores: Scores) -> Tensor:
    """What ε-DPO compares with 0: z(1 + ε) - z(1) and z(1) - z(1 - ε) of each pair, (B, 2)."""
    assert scores.perturbed is not None
    tokens = scores.perturbed.outward - scores.token_logps, scores.token_logps - scores.perturbed.inward
    return torch.stack([one.sum(-1)[:, 0] - one.sum(-1)[:, 1] for one in tokens], 1)


def shares(changes: Tensor, precision: str) -> dict[str, float]:
    """How many of the decisions are +1, -1, ties, and neither since z rises on one side and falls on the other."""
    signs = changes.sign()
    up, down, ties = (signs > 0).all(1), (signs < 0).all(1), (signs == 0).any(1)
    kinds = {"+1": up, "-1": down, "ties": ties, "not monotone": ~(up | down | ties)}
    return {f"{name}, {precision}": chosen.double().mean().item() for name, chosen in kinds.items()}


def margins(steps: Tensor, gaps: Tensor) -> dict[str, float]:
    """Mean and quantiles of the log-ratio margins (B,) by the direction of the pair."""
    found: dict[str, float] = {}
    for name, direction in DIRECTIONS.items():
        some = gaps[steps == direction].double()
        if len(some) == 0:  # no pair goes there, so there is nothing to report of it
            continue
        found[f"margin of {name} pairs"] = some.mean().item()
        found |= {f"{name} quantile {q}": some.quantile(q).item() for q in QUANTILES}
    return found


def training_pairs(run: Run, tokenizer: Any, number: int) -> CompletionBatch:
    """The first pairs a run has trained on, one for each prompt."""
    config: Mapping[str, Any] = run.config["data"]
    none = {"validation_dataset": None, "validation_split": None, "validation_size": 0}
    data = data_of({"data": {**config, "init_args": {**config["init_args"], **none}}})
    data.load(tokenizer)
    pairs: CompletionBatch = data.prompts(number)
    return pairs


def cut(pairs: CompletionBatch) -> Iterator[CompletionBatch]:
    """Some at a time."""
    return (pairs.rows(slice(start, start + AT_ONCE)) for start in range(0, len(pairs.row), AT_ONCE))


def rounded_changes(pair: PolicyReferencePair, batch: CompletionBatch, epsilon: float, after: torch.dtype) -> Tensor:
    """The same where the model's own head forms the logits, in the type of the weights.

    As a program does that thinks nothing of it: z(λ) = log π_λ(y_w) - log π_λ(y_l) under softmax((1 + ε) f_θ - ε f_ref)
    and softmax((1 - ε) f_θ + ε f_ref), and comparisons of these.

    Args:
        pair: Policy and reference.
        batch: B pairs.
        epsilon: ε.
        after: Type of all that follows the logits: their mixtures, log-probs and sums.

    Returns:
        z(1 + ε) - z(1) and z(1) - z(1 - ε), (B, 2).
    """
    ids, predicts, targets = rows_of(batch)
    attention = torch.ones_like(ids)  # padding stands behind, where a causal model does not look
    policy = pair.base(input_ids=ids, attention_mask=attention).logits.to(after) / pair.settings.temperature
    with pair.as_reference():
        reference = pair.base(input_ids=ids, attention_mask=attention).logits.to(after) / pair.settings.temperature
    wide, one, narrow = (
        gap((1 + c) * policy - c * reference, ids, predicts, targets) for c in (epsilon, 0.0, -epsilon)
    )
    return torch.stack([wide - one, one - narrow], 1)


def rows_of(batch: CompletionBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt and completion, one after the other, for both completions of each pair.

    Returns:
        ids int64 (2B, N), padded behind; which positions predict a completion token, and which hold one, bool (2B, N).
    """
    prompts, asked = (one.repeat_interleave(2, 0) for one in (batch.prompt_ids, batch.prompt_mask))
    ids = torch.cat([prompts, batch.completion_ids.flatten(0, 1)], 1)
    there = torch.cat([asked, batch.completion_mask.flatten(0, 1)], 1)
    answer = torch.cat([torch.zeros_like(asked), batch.completion_mask.flatten(0, 1)], 1)
    order = (~there).long().argsort(dim=1, stable=True)  # tokens first, in their order
    ids, answer = ids.gather(1, order), answer.gather(1, order)
    return ids, answer.roll(-1, 1), answer


def gap(logits: Tensor, ids: Tensor, predicts: Tensor, targets: Tensor) -> Tensor:
    """log π(y_w) - log π(y_l) of each pair, (B,), in the type of the logits (2B, N, V)."""
    logps = torch.zeros_like(logits[..., 0])
    logps[predicts] = logits[predicts].log_softmax(-1).gather(-1, ids[targets][:, None])[:, 0]
    chosen, rejected = logps.sum(1).view(-1, 2).unbind(1)
    return chosen - rejected
