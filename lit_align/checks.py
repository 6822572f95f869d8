"""Checks of a run as a whole: does the data suit the objective, is the reference what training starts from."""

from __future__ import annotations

from lit_align.batch import CompletionBatch, Scores
from lit_align.errors import UserError


def check_groups(
    objective: str, columns: tuple[int, int], needs_reward: bool, data: str, batch: CompletionBatch
) -> None:
    """Refuse data an objective cannot learn from.

    Args:
        objective: Its name.
        columns: Fewest and most completions of a group it takes.
        needs_reward: Whether it reads rewards.
        data: Name of the data module.
        batch: Some of its groups.

    Raises:
        UserError: If groups have too few or too many completions, or no rewards where they are needed.
    """
    least, most = columns
    found = batch.present.shape[1]
    if not least <= found <= most:
        wanted = f"{least}" if least == most else f"{least} or more" if most > 2 else f"{least} or {most}"
        raise UserError(
            f"{objective} learns from groups of {wanted} completions, and {data} gives {found}: choose another --data "
            "or --data.select (docs/data.md), or another objective"
        )
    if needs_reward and batch.reward is None:
        raise UserError(
            f"{objective} needs a reward for each completion, and the rows of {data} have none: give rows with "
            "`completions` and `rewards` to --data ScoredGroups"
        )


def check_start(scores: Scores, model: str) -> None:
    """Policy and reference agree to the last bit before the first optimizer step.

    Args:
        scores: Scores of a batch by both.
        model: The model's name, for the message.

    Raises:
        UserError: If they differ on any token.
    """
    assert scores.reference_token_logps is not None
    gap = (scores.token_logps - scores.reference_token_logps).detach().abs().max()
    if not gap == 0:
        raise UserError(
            f"before the first step policy and reference differ by {gap.item():.3g} nats on a token, where they must "
            f"agree exactly: the reference of {model} is not the model training starts from"
        )
