"""VADER's compound score against values worked from its published formula and lexicon.

The valences are those of vader_lexicon.txt: good 1.9, bad -2.5, happy 2.7, sad -2.1, great 3.1. A word alone sums to
its valence; an exclamation mark adds 0.292 in the direction of the sum; "not" before a word multiplies by -0.74; the
compound score is x / sqrt(x² + 15), rounded to four places.
"""

from __future__ import annotations

import builtins
import math
import sys
from typing import Any

import pytest
import torch

from lit_align.errors import UserError
from lit_align.protocols import Reward, TokenReward
from lit_align.rewards import Length, Vader
from tests.families import ragged_batch


def compound(x: float) -> float:
    return round(x / math.sqrt(x * x + 15), 4)


@pytest.mark.parametrize(
    ("text", "x"),
    [
        ("good", 1.9),
        ("bad", -2.5),
        (" The dog was happy.", 2.7),
        (" She was sad.", -2.1),
        (" The day was good and great.", 1.9 + 3.1),
        (" He was happy and sad.", 2.7 - 2.1),
        (" He was happy!", 2.7 + 0.292),
        (" He was sad!", -2.1 - 0.292),
        (" It was not good.", -0.74 * 1.9),
        (" The table is round.", 0.0),
        ("", 0.0),
    ],
)
def test_compound_follows_the_formula(text: str, x: float) -> None:
    assert Vader()([""], [text]) == pytest.approx([compound(x)], abs=1e-4)


def test_only_the_completion_counts_and_order_is_kept() -> None:
    rewards = Vader()(["bad bad bad", "great", "sad"], ["good", "bad", "table"])
    assert rewards == pytest.approx([compound(1.9), compound(-2.5), 0.0], abs=1e-4)
    assert all(type(reward) is float for reward in rewards)


def test_it_is_a_reward() -> None:
    assert isinstance(Vader(), Reward)
    assert Vader()([], []) == []


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="1 prompts for 2 completions"):
        Vader()(["a"], ["b", "c"])


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("vaderSentiment"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.startswith("vaderSentiment")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="pip install vaderSentiment"):
        Vader()


def test_lengths_count_the_policys_tokens_with_the_end_of_sequence() -> None:
    batch = ragged_batch()
    tokens = torch.tensor([[6, 9, 4], [12, 1, 3], [2, 8, 0], [5, 5, 7]])  # as ragged_batch is built
    assert torch.equal(Length().on_tokens(batch, None), -tokens.float())
    assert torch.equal(Length(5).on_tokens(batch, None), -(tokens - 5).abs().float())
    assert isinstance(Length(), TokenReward)


def test_lengths_cannot_be_told_from_texts_and_have_no_target_below_1() -> None:
    with pytest.raises(UserError, match="counts tokens"):
        Length()(["a"], ["b"])
    with pytest.raises(UserError, match="target is 0; it must be 1 or more"):
        Length(0)
