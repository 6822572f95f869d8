"""Checks of a run as a whole: data that suits the objective, a reference that is the start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from lit_align.batch import Batch, MixedBatch, Scores, completions_of
from lit_align.errors import UserError

log = logging.getLogger(__name__)


def check_groups(objective: type[Any], data: Any, batch: Batch) -> None:
    """Refuse data an objective cannot learn from.

    Args:
        objective: The class, an ``AlignModule``.
        data: The data module.
        batch: Some of its groups.

    Raises:
        UserError: If groups have too few or too many completions, no rewards where they are needed, bad completions
            or those of other prompts among the ones to learn from, completions of a dataset where only fresh ones
            will do, or samples of the policy that are not read.
    """
    name, source, (least, most) = objective.__name__, type(data).__name__, objective.columns
    if objective.needs_fresh and not getattr(data, "fresh", False):
        raise UserError(
            f"{name} learns from completions the policy has just drawn, and {source} gives those of a dataset: use "
            "--data OnPolicyData, or an objective that can do without, such as DPO"
        )
    if isinstance(batch, MixedBatch) and not objective.mixes:
        raise UserError(
            f"{name} does not read the samples of the policy that {source} draws beside the pairs: "
            "use --data PreferenceData"
        )
    batch = completions_of(batch)
    counts = batch.present.sum(-1)
    if counts.min() < least or counts.max() > most:
        wanted = f"{least}" if least == most else f"{least} or more"
        found = (
            f"{int(counts.min())}" if counts.min() == counts.max() else f"{int(counts.min())} to {int(counts.max())}"
        )
        raise UserError(
            f"{name} learns from groups of {wanted} completions, and {source} gives {found}: choose another --data "
            "or --data.select (docs/data.md), or another objective"
        )
    if (
        getattr(data, "fresh", False)
        and most == 2
        and not objective.needs_reward
        and getattr(data, "select", "") == "ranked"
    ):
        raise UserError(
            f"{name} takes the first of two completions for the better one, and with select=ranked both may have the "
            "same reward: set data.select to best_and_worst, which leaves such prompts out"
        )
    if objective.needs_reward and batch.reward is None:
        raise UserError(
            f"{name} needs a reward for each completion, and the rows of {source} have none: give rows with "
            "`completions` and `rewards` to --data ScoredGroups, or labelled ones to --data UnpairedData"
        )
    if most > 1 and getattr(data, "mismatched", False):
        raise UserError(
            f"{name} learns from every completion in a batch, and {source} puts that of another prompt beside each: "
            "use --data ScoredGroups for completions with rewards, or --data Demonstrations for good ones"
        )
    if not objective.compares and getattr(data, "comparing", False):
        raise UserError(
            f"{name} imitates every completion it is given, and {source} also gives the worse ones: "
            "use --data Demonstrations"
        )


def check_precision(precision: str) -> None:
    """Refuse precisions that would round the adapter itself.

    Args:
        precision: The trainer's, such as "32-true".

    Raises:
        UserError: For 16-bit weights throughout, with what to set instead.
    """
    if precision in {"16-true", "bf16-true"}:
        raise UserError(
            f"trainer.precision={precision} would hold the adapter and adapted values in 16 bits, which loses small "
            "updates; leave it at 32-true and set model.pair.dtype=bfloat16: only the base is then in 16 bits"
        )


def check_cache(cache: bool | str, precision: str) -> None:
    """Refuse to keep log-probs that were computed in 16 bits.

    Args:
        cache: The setting ``reference_cache``.
        precision: The trainer's.

    Raises:
        UserError: If the trainer rounds what the model computes.
    """
    if cache and precision != "32-true":
        raise UserError(
            f"model.pair.reference_cache does not go with trainer.precision={precision}: log-probs then depend on what "
            "else is in the batch; leave the precision at 32-true, or the cache out"
        )


def check_start(scores: Scores, model: str, tolerance: float = 0.0) -> None:
    """Policy and reference agree before the first optimizer step.

    Args:
        scores: Scores of a batch by both.
        model: The model's name, for the message.
        tolerance: Largest difference accepted on a token, nats, >= 0: 0 where both score the same batch, and what
            rounding may do where the reference's log-probs come from the cache.

    Raises:
        UserError: If they differ by more on any token.
    """
    assert scores.reference_token_logps is not None
    gap = (scores.token_logps - scores.reference_token_logps).detach().abs().max()
    if not gap <= tolerance:
        must = f"may differ by {tolerance:.0e}" if tolerance else "must agree exactly"
        cached = ", or its reference cache is damaged: delete it" if tolerance else ""
        raise UserError(
            f"before the first step policy and reference differ by {gap.item():.3g} nats on a token, where they "
            f"{must}: the reference of {model} is not the model training starts from{cached}"
        )


def usable_accelerator(name: Any) -> Any:
    """Refuse a GPU that is not there, or that lacks what is needed, before anything is loaded.

    Args:
        name: ``trainer.accelerator``.

    Returns:
        The same, but the CPU where "auto" would take an Apple GPU.

    Raises:
        UserError: With what PyTorch sees and the remedies.
    """
    if name in {"auto", "gpu", "mps"} and torch.backends.mps.is_available():
        lacks = "the Apple GPU lacks float64, and metrics and adapted values are held in that"
        if name != "auto":
            raise UserError(f"trainer.accelerator is {name}, but {lacks}: use --trainer.accelerator cpu")
        log.warning("%s: the CPU is used", lacks)
        return "cpu"
    if name in {"gpu", "cuda"} and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator is {name}, but PyTorch {torch.__version__} sees no GPU. If there is one, check that "
            "nvidia-smi lists it and that PyTorch was built for CUDA (https://pytorch.org/get-started); otherwise use "
            "--trainer.accelerator cpu, or put --config configs/hardware/cpu.yaml last"
        )
    return name


def check_checkpoint_path(path: str | None) -> None:
    """Refuse a checkpoint that is not there, before anything is loaded.

    Raises:
        UserError: With the path.
    """
    if path and path not in {"last", "best", "hpc", "registry"} and "://" not in path and not Path(path).is_file():
        raise UserError(f"ckpt_path={path}: there is no such file; runs keep theirs in RUN_DIR/checkpoints/last.ckpt")
