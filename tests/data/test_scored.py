from __future__ import annotations

import pytest
import torch

from lit_align.checks import check_groups
from lit_align.data import PreferenceData, ScoredGroups
from lit_align.data.rows import DataError
from lit_align.errors import UserError
from lit_align.objectives import DPO
from tests.data.conftest import byte_tokenizer, everything, texts_of, validating, write_jsonl


def row(number: int, *completions: tuple[str, float]) -> dict:
    texts, rewards = zip(*completions, strict=True) if completions else ((), ())
    return {"prompt": f"Q{number}", "completions": list(texts), "rewards": list(rewards)}


FOUR_TEXTS = (("c", 0.5), ("a", 3.0), ("d", -1.0), ("b", 2.0))
FOUR = row(0, *FOUR_TEXTS)
TWO = row(1, ("worse", 0.0), ("better", 1.0))
PAIR = {"prompt": "Q", "chosen": " yes", "rejected": " no"}


def read(path, *rows: dict, **options):
    data = validating(ScoredGroups, path, list(rows), **options)
    return everything(data), data.report.parts["train"]


def test_columns_are_sorted_best_first_and_absent_ones_are_marked(tmp_path):
    batch, report = read(tmp_path, FOUR, TWO)
    assert texts_of(batch) == [["a</s>", "b</s>", "c</s>", "d</s>"], ["better</s>", "worse</s>"]]
    assert batch.reward.tolist() == [[3, 2, 0.5, -1], [1, 0, 0, 0]]
    assert batch.present.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.row.tolist() == [0, 1]
    assert (report.kept, report.groups, report.completions) == (2, 2, {"chosen": 2, "rejected": 4})
    assert report.noted == {}


def test_ties_keep_their_order_and_are_counted(tmp_path):
    batch, report = read(tmp_path, TWO, row(2, ("x", 1), ("y", 5), ("z", 1), ("w", 5)))
    assert texts_of(batch)[1] == ["y</s>", "w</s>", "x</s>", "z</s>"]
    assert report.noted["some rewards equal, order kept"].places == ["rows.jsonl:2"]


def test_rows_of_no_use_are_dropped_and_counted(tmp_path):
    useless = [
        row(2, ("a", 1), ("b", 1), ("c", 1)),
        row(3, ("a", 1)),
        row(4),
        row(5, ("same", 1), ("same", 2), ("same", 3)),
        row(6, (" ", 1), ("b", 1)),
        {"prompt": "Q", "completions": ["same", "same"], "rewards": [0, 1]},
    ]
    batch, report = read(tmp_path, FOUR, *useless, max_dropped=0.9)
    assert batch.row.tolist() == [0]
    assert {reason: tally.places for reason, tally in report.dropped.items()} == {
        "all rewards equal": ["rows.jsonl:2"],
        "fewer than two completions": ["rows.jsonl:3", "rows.jsonl:4", "rows.jsonl:6"],
        "identical completions": ["rows.jsonl:5"],
        "identical pair": ["rows.jsonl:7"],
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_no_finite_number_names_its_place(tmp_path, value):
    with pytest.raises(DataError, match=rf'rows.jsonl:2: "rewards"\[1\] must be a finite number, not {value}'):
        read(tmp_path, TWO, row(1, ("a", 0), ("b", value)))


@pytest.mark.parametrize(
    ("select", "texts", "rewards"),
    [
        ("ranked", [["a", "b", "c", "d"]], [[3, 2, 0.5, -1]]),
        ("best_and_worst", [["a", "d"]], [[3, -1]]),
        ("best", [["a"]], [[3]]),
        (
            "all_pairs",
            [["a", "b"], ["a", "c"], ["a", "d"], ["b", "c"], ["b", "d"], ["c", "d"]],
            [[3, 2], [3, 0.5], [3, -1], [2, 0.5], [2, -1], [0.5, -1]],
        ),
    ],
)
def test_each_selection(tmp_path, select, texts, rewards):
    batch, report = read(tmp_path, FOUR, select=select)
    assert texts_of(batch) == [[text + "</s>" for text in group] for group in texts]
    assert batch.reward.tolist() == rewards
    assert batch.row.tolist() == [0] * len(texts)
    assert (report.kept, report.groups) == (1, len(texts))
    assert bool(batch.present.all())


def test_all_pairs_leave_out_ties_and_identical_texts(tmp_path):
    tied = row(2, ("x", 1), ("y", 1), ("z", 0), ("x", 0.5))
    batch, report = read(tmp_path, tied, select="all_pairs")
    # Ranked: x 1, y 1, x 0.5, z 0; the first two tie, and x beats x.
    assert texts_of(batch) == [[a + "</s>", b + "</s>"] for a, b in ("xz", "yx", "yz", "xz")]
    assert batch.reward.tolist() == [[1, 0], [1, 0.5], [1, 0], [0.5, 0]]
    assert report.noted["identical pair left out of a row"].count == 1
    assert report.noted["some rewards equal, order kept"].count == 1


def test_the_first_completions_as_given_are_taken_before_sorting(tmp_path):
    batch, _ = read(tmp_path, FOUR, max_completions=3)
    assert texts_of(batch) == [["a</s>", "c</s>", "d</s>"]]
    batch, _ = read(tmp_path, FOUR, max_completions=2, select="best_and_worst")
    assert texts_of(batch) == [["a</s>", "c</s>"]]
    _, report = read(tmp_path, FOUR, row(1, ("a", 1), ("b", 1), ("c", 2)), max_completions=2, max_dropped=0.5)
    assert report.dropped["all rewards equal"].places == ["rows.jsonl:2"]
    with pytest.raises(DataError, match=r"data.max_completions=1 must be at least 2: leave it out to take all"):
        ScoredGroups(max_completions=1)


def test_pairs_are_groups_of_two_with_rewards_one_and_zero(tmp_path):
    for pair in ({"prompt": "Q", "chosen": " yes", "rejected": " no"}, {"chosen": "Q yes", "rejected": "Q no"}):
        batch, _ = read(tmp_path, pair)
        assert texts_of(batch) == [[" yes</s>", " no</s>"]]
        assert batch.reward.tolist() == [[1, 0]]


def test_scores_win_where_a_dataset_also_has_pairs(tmp_path):
    batch, _ = read(tmp_path, {**FOUR, "chosen": "yes", "rejected": "no"})
    assert batch.present.shape == (1, 4)


def test_every_completion_of_a_row_shares_its_tokens_among_the_pairs(tmp_path):
    data = ScoredGroups(str(write_jsonl(tmp_path / "a.jsonl", [FOUR])), validation_size=0, select="all_pairs")
    data.load(byte_tokenizer())
    held = {ids.data_ptr() for group in data.train_dataloader().dataset for ids in group.completion_ids}
    assert len(held) == 4


def test_the_rewards_of_all_training_completions_are_what_one_is_compared_with(tmp_path):
    data = validating(ScoredGroups, tmp_path, [FOUR, TWO, row(3, ("a", 1), ("b", 1))], max_dropped=0.5)
    assert data.training_rewards.dtype == torch.float32
    assert sorted(data.training_rewards.tolist()) == [-1, 0, 0.5, 1, 2, 3]
    held = ScoredGroups(str(write_jsonl(tmp_path / "b.jsonl", [FOUR, TWO])), validation_size=1)
    assert held.training_rewards is None
    held.load(byte_tokenizer())
    kept, validation = (held._train, held._validation)
    assert sorted(held.training_rewards.tolist()) == sorted(kept[0].rewards)
    assert len(kept) == len(validation) == 1


def test_data_without_rewards_has_none_to_compare_with(tmp_path):
    data = PreferenceData(str(write_jsonl(tmp_path / "a.jsonl", [PAIR])), validation_size=0)
    data.load(byte_tokenizer())
    assert data.training_rewards is None


def mean_of_words(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that cannot take an empty text, and refuses what begins with a bad word."""
    return [sum(map(len, text.split())) / len(text.split()) + 0 / (not text.startswith("bad")) for text in completions]


def judged(path, *rows: list[str]):
    old = [row(n, *((text, float(place)) for place, text in enumerate(texts))) for n, texts in enumerate(rows)]
    data = validating(ScoredGroups, path, old, reward=mean_of_words, max_dropped=0.9)
    return everything(data), data.report.parts["train"]


def test_columns_that_only_pad_a_group_are_no_completions_for_a_reward(tmp_path):
    batch, report = judged(tmp_path, ["a", "bbb", "cc"], ["dd", "e"], ["f", "gggg"])
    assert batch.reward.tolist() == [[3, 2, 1], [2, 1, 0], [4, 1, 0]]
    assert report.dropped == {}


def test_a_reward_that_fails_late_loses_rows_and_one_that_fails_at_once_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_align.data.scored.JUDGED_AT_ONCE", 2)
    batch, report = judged(tmp_path, ["a", "bb"], ["c", "dd"], ["bad", "e"])
    assert batch.row.tolist() == [0, 1]
    assert [tally.places for tally in report.dropped.values()] == [["row 2"]]
    with pytest.raises(DataError, match="ZeroDivisionError"):
        judged(tmp_path, ["bad", "a"], ["bad", "b"], ["c", "dd"])


def test_training_groups_of_another_size_than_those_of_validation_are_seen(tmp_path):
    """However late they come among the training rows."""
    pairs = [row(number, ("a", 1.0), ("b", 0.0)) for number in range(9)]
    written = write_jsonl(tmp_path / "train.jsonl", [*pairs, row(9, *FOUR_TEXTS)])
    data = ScoredGroups(str(written), validation_dataset=str(write_jsonl(tmp_path / "held.jsonl", pairs[:2])))
    data.load(byte_tokenizer())
    assert data.examples(3).present.sum(-1).tolist() == [2, 2, 2, 2, 4, 2, 2]
    with pytest.raises(UserError, match="DPO learns from groups of 2 completions, and ScoredGroups gives 2 to 4"):
        check_groups(DPO, data, data.examples(3))
