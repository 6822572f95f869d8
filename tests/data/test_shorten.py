"""Completions cut short on purpose, and judged anew."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lit_align.data import ScoredGroups
from lit_align.data.collate import Group
from lit_align.data.rows import DataError
from lit_align.data.shorten import Shorten, shortened
from lit_align.rewards import Length
from tests.data.conftest import byte_tokenizer

EOS = 1


def groups(count: int, length: int, columns: int = 2) -> list[Group]:
    ids = torch.cat([torch.full((length - 1,), 7, dtype=torch.int32), torch.tensor([EOS], dtype=torch.int32)])
    return [Group(row, torch.tensor([3], dtype=torch.int32), [ids] * columns, None) for row in range(count)]


def lengths(found: list[Group]) -> torch.Tensor:
    return torch.tensor([len(ids) for group in found for ids in group.completion_ids])


def test_the_new_lengths_are_exponential_and_end_properly() -> None:
    found = shortened(groups(2000, 200), Shorten(share=0.95, mean=10.0), 0, EOS)
    drawn = lengths(found)
    assert all(int(ids[-1]) == EOS and (ids[:-1] == 7).all() for group in found for ids in group.completion_ids)
    share = (drawn < 200).double().mean().item()
    assert share == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))
    # One more than a rounded exponential: its mean, and the share below the mean, by integration.
    short = drawn[drawn < 200].double() - 1
    assert short.mean().item() == pytest.approx(10.0, abs=4 * 10 / math.sqrt(len(short)))
    below = 1 - math.exp(-9.5 / 10)
    assert (short <= 9).double().mean().item() == pytest.approx(
        below, abs=4 * math.sqrt(below * (1 - below) / len(short))
    )


def test_what_is_drawn_depends_on_seed_row_and_column_alone() -> None:
    whole = shortened(groups(6, 50, 3), Shorten(), 4, EOS)
    part = shortened(groups(6, 50, 2)[2:4], Shorten(), 4, EOS)
    assert (
        lengths([whole[2]._replace(completion_ids=whole[2].completion_ids[:2])]).tolist() == lengths(part[:1]).tolist()
    )
    assert lengths(whole).tolist() != lengths(shortened(groups(6, 50, 3), Shorten(), 5, EOS)).tolist()
    assert lengths(shortened(groups(6, 50), Shorten(share=0.0), 0, EOS)).tolist() == [50] * 12


def test_completions_are_judged_anew_after_they_are_cut(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{n}", "completions": ["aaaa" * (n + 1), "a", "aa"], "rewards": [1.0, 1.0, 1.0]} for n in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ScoredGroups(str(tmp_path / "rows.jsonl"), reward=Length(), validation_size=0)
    data.load(byte_tokenizer())
    batch = data.prompts(9)
    assert batch.lengths.tolist() == [[2, 3, 4 * (n + 1) + 1] for n in range(4)]  # with the end of sequence
    assert batch.reward is not None
    torch.testing.assert_close(batch.reward, -batch.lengths.float())
    pairs = ScoredGroups(str(tmp_path / "rows.jsonl"), reward=Length(3), validation_size=0, select="best_and_worst")
    pairs.load(byte_tokenizer())
    assert pairs.prompts(9).lengths.tolist() == [[3, 5], [3, 9], [3, 13], [3, 17]]


def test_a_reward_that_fails_or_says_nothing_costs_the_row(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "completions": ["a" * (n + 1), "bb"], "rewards": [0.0, 1.0]} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def judge(prompts: list[str], completions: list[str]) -> list[float]:
        return [math.nan if text == "aaaa" else float(len(text)) for text in completions]

    data = ScoredGroups(str(tmp_path / "rows.jsonl"), reward=judge, validation_size=0, max_dropped=0.5)
    data.load(byte_tokenizer())
    assert data.prompts(9).row.tolist() == [0, 2]
    assert {reason: tally.count for reason, tally in data.report.parts["train"].dropped.items()} == {
        "all rewards equal": 1,
        "the reward failed": 1,
    }


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(DataError, match=r"share=1.5 must be from 0 to 1"):
        Shorten(share=1.5)
    with pytest.raises(DataError, match="mean=0 must be greater than 0"):
        Shorten(mean=0)
    with pytest.raises(DataError, match=r"set data\.reward"):
        ScoredGroups(shorten=Shorten())
