"""SFT: maximum likelihood of given completions. The data says which: demonstrations, the chosen, or all good ones."""

from __future__ import annotations

from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule


def sft_loss(token_logps: Tensor) -> Tensor:
    """Negative log-likelihood of each token.

        L_t = -log π_θ(y_t | x, y_<t)

    Args:
        token_logps: log π_θ of each completion token in nats, (B, K, L).

    Returns:
        The loss of each token in nats, (B, K, L), >= 0.
    """
    return -token_logps


class SFT(AlignModule):
    """Supervised fine-tuning: every completion token of an optimizer step counts the same.

    On demonstrations this is SFT; on the chosen completion of each pair Pref-FT; on all completions labelled good
    binary FeedME (both as in arXiv 2404.14367, there summed over tokens, which weights long completions likewise).

    Args:
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    columns = (1, 2**31)
    compares = False

    def loss(self, batch: CompletionBatch) -> Loss:
        """The loss of each token."""
        scores = self.score(batch, reference=False)
        value = sft_loss(scores.token_logps)
        return Loss(value, batch.completion_mask.to(value.dtype), None, {})
