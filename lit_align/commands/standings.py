"""The candidates of an evaluation, how they compare, and how that is written down and shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lit_align.batch import CompletionBatch
from lit_align.callbacks.draws import Draw
from lit_align.commands.screen import wide_console
from lit_align.commands.statistics import Candidate, Comparison, Estimate, best_of, best_of_kl, compared, over_prompts
from lit_align.errors import UserError

MODELS = ("reference", "policy")
PLAIN = 16
"""Of the draws for best of N, how many are also used as plain samples."""
DIGITS = {"reward": ".3f", "kl": ".2f", "tokens": ".1f", "ended": ".1%"}


class Standings:
    """Reference, policy and the dataset's chosen completion, and the best of N draws of either model.

    Args:
        drawn: What the reference and what the policy drew for the same N prompts, judged if there is a reward.
        chosen: The prompts with their chosen completions in column 0, where ``present``, and the rewards of these.
        completions: Draws that count as plain samples, >= 1; with best of N as many as there are, up to 16.
        n: N of best of N, or None.

    Raises:
        UserError: If the reward failed on every prompt.
    """

    def __init__(self, drawn: Sequence[Draw], chosen: CompletionBatch, completions: int, n: int | None) -> None:
        self.drawn, self.best = drawn, n
        self.judged = drawn[0].reward is not None
        rewards = [torch.full(one.tokens.shape, math.nan) if one.reward is None else one.reward for one in drawn]
        lost = torch.stack([values.isnan().any(1) for values in rewards]).any(0)
        if self.judged and lost.all():
            raise UserError("the reward failed on every prompt, so there is nothing to compare")
        self.failed = int(lost.sum()) if self.judged else 0
        for one, values in zip(drawn, rewards, strict=True):
            one.reward = values.masked_fill(lost[:, None], math.nan)  # a prompt counts for both models or for neither
        plain = max(completions, min(n or 1, PLAIN))
        self.candidates = [_plain(name, one, plain) for name, one in zip(MODELS, drawn, strict=True)]
        if n is not None:
            both = zip(MODELS, drawn, strict=True)
            self.candidates += [_kept(f"{name}, best of {n}", one, n) for name, one in both]
        if chosen.present[:, 0].any():
            self.candidates.append(_chosen(chosen))
        self.comparisons = list(self._compared()) if self.judged else []

    @property
    def gain(self) -> Estimate:
        """Mean reward of the policy less that of the reference; the error is that of the differences by prompt."""
        reference, policy = ((one.reward * one.weight).sum(1) for one in self.candidates[:2])
        return over_prompts(_known(policy - reference))

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        found: dict[str, Any] = {"candidates": {one.name: _figures(one) for one in self.candidates}}
        if self.judged:
            found["gain"] = self.gain._asdict()
        if self.best is not None:
            found["best_of_kl"] = {"n": self.best, "nats": best_of_kl(self.best)}
        found["comparisons"] = [_as_dict(one) for one in self.comparisons]
        found["prompts_without_reward"] = self.failed
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """One record for each completion drawn."""
        for name, one in zip(MODELS, self.drawn, strict=True):
            yield from ({"model": name, **{key: row[key] for key in row if key != "step"}} for row in one.rows())

    def show(self) -> None:
        """Print the tables and what must be known to read them."""
        console = wide_console()
        console.print(_candidate_table(self.candidates, self.judged))
        if self.comparisons:
            console.print(_comparison_table(self.comparisons))
        if self.judged:
            print(f"gain in reward over the reference: {self.gain:.3f}")
        if self.best is not None:
            print(f"the best of {self.best} is at most {best_of_kl(self.best):.2f} nats from the model that draws it")
        if self.failed:
            print(f"left out: {self.failed} prompts on which the reward failed")

    def _compared(self) -> Iterator[Comparison]:
        """Every two candidates that drew independently of each other."""
        of = {one.name: one for one in self.candidates}
        best = f", best of {self.best}"
        pairs = [("policy", "reference"), ("policy", "chosen"), ("reference", "chosen")]
        pairs += [(f"policy{best}", "reference"), (f"policy{best}", "chosen"), (f"reference{best}", "chosen")]
        pairs += [("policy", f"reference{best}"), (f"policy{best}", f"reference{best}")]
        for first, second in pairs:
            if first in of and second in of and (found := compared(of[first], of[second])) is not None:
                yield found


def _plain(name: str, drawn: Draw, columns: int) -> Candidate:
    """The first draws, each counting alike."""
    assert drawn.reward is not None
    reward, tokens, ended = (values[:, :columns].double() for values in (drawn.reward, drawn.tokens, drawn.ended))
    kl = None if drawn.kl is None else drawn.kl.double()  # does not depend on which are kept, so all of them
    return Candidate(name, reward, tokens, torch.full_like(reward, 1 / reward.shape[1]), ended, kl)


def _kept(name: str, drawn: Draw, n: int) -> Candidate:
    """All draws, each by its chance to be the best of n."""
    assert drawn.reward is not None
    reward = drawn.reward.double()
    failed = reward.isnan()  # none of those prompts has a best one
    tokens, ended = (values.double().masked_fill(failed, torch.nan) for values in (drawn.tokens, drawn.ended))
    return Candidate(name, reward, tokens, best_of(reward, n), ended)


def _chosen(batch: CompletionBatch) -> Candidate:
    """The dataset's good completions; NaN where a prompt has none."""
    there = batch.present[:, :1]
    reward = torch.zeros(there.shape) if batch.reward is None else batch.reward[:, :1]
    reward = reward.double().masked_fill(~there, math.nan)
    tokens = batch.lengths[:, :1].double().masked_fill(~there, math.nan)
    return Candidate("chosen", reward, tokens, torch.ones_like(reward))


def _known(values: Tensor) -> Tensor:
    return values[~values.isnan()]


def _means(one: Candidate) -> dict[str, Estimate]:
    """Means over prompts of what is known of a candidate."""
    weighted = {"reward": one.reward, "tokens": one.tokens, "ended": one.ended}
    found = {name: _known((values * one.weight).sum(1)) for name, values in weighted.items() if values is not None}
    if one.kl is not None:
        found["kl"] = one.kl.mean(1)
    return {name: over_prompts(values) for name, values in found.items() if len(values)}


def _figures(one: Candidate) -> dict[str, Any]:
    return {name: value._asdict() for name, value in _means(one).items()}


def _as_dict(one: Comparison) -> dict[str, Any]:
    controlled = one.length_controlled
    estimates = {"win_rate": one.win_rate._asdict(), "length_controlled": controlled and controlled._asdict()}
    return one._asdict() | estimates


def _candidate_table(candidates: Sequence[Candidate], judged: bool) -> Table:
    table = Table(title="mean ± standard error over prompts")
    for column in ("", *(["reward"] if judged else []), "KL to reference, nats", "tokens", "ended"):
        table.add_column(column, justify="right" if column else "left")
    for one in candidates:
        means = _means(one)
        names = [*(["reward"] if judged else []), "kl", "tokens", "ended"]
        table.add_row(one.name, *(f"{means[name]:{DIGITS[name]}}" if name in means else "–" for name in names))
    return table


def _comparison_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table(title="win rates by the reward, a tie counting ½")
    for column in ("", "against", "prompts", "win rate", "ties", "at equal length", "longer by"):
        table.add_column(column, justify="left" if column in {"", "against"} else "right")
    for one in comparisons:
        controlled = "–" if one.length_controlled is None else f"{one.length_controlled:.3f}"
        cells = (str(one.prompts), f"{one.win_rate:.3f}", f"{one.ties:.0%}", controlled, f"{one.longer:+.1f}")
        table.add_row(one.first, one.second, *cells)
    return table
