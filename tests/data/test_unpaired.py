from __future__ import annotations

import warnings

import pytest
import torch

from lit_align.data import UnpairedData, unpaired
from lit_align.data.collate import Group
from lit_align.data.rows import DataError
from lit_align.data.unpaired import collate_unpaired
from tests.data.conftest import byte_tokenizer, everything, pair_rows, texts_of, validating, write_jsonl


def row(prompt: str, completion: str, label: object) -> dict:
    return {"prompt": prompt, "completion": completion, "label": label}


def read(path, *rows: dict, **options):
    data = validating(UnpairedData, path, list(rows), **options)
    return everything(data), data.report.parts["train"]


def group(number: int, prompt: list[int], completion: list[int], label: float) -> Group:
    return Group(
        number,
        torch.tensor(prompt, dtype=torch.int32),
        [torch.tensor(completion, dtype=torch.int32)],
        [label],
    )


@pytest.fixture(autouse=True)
def fresh():
    """Each test sees the warning that comes once in a process."""
    unpaired._warn_of_one_prompt.cache_clear()


def test_labels_are_rewards_and_the_second_column_is_the_next_prompts_completion(tmp_path):
    rows = [row("A", "a", True), row("B", "b", False), row("C", "c", 1), row("D", "d", 0)]
    batch, report = read(tmp_path, *rows)
    assert texts_of(batch) == [["a</s>", "b</s>"], ["b</s>", "c</s>"], ["c</s>", "d</s>"], ["d</s>", "a</s>"]]
    assert batch.reward.tolist() == [[1, 0], [-1, 0], [1, 0], [-1, 0]]
    assert bool(batch.present.all())
    assert batch.row.tolist() == [0, 1, 2, 3]
    assert report.completions == {"good": 2, "bad": 2}


def test_the_next_prompt_is_another_prompt_in_a_circle():
    groups = [
        group(0, [1], [10], 1.0),
        group(1, [2], [11], 1.0),
        group(2, [2], [12], -1.0),
        group(3, [3], [13], 1.0),
        group(4, [1], [14], -1.0),
    ]
    batch = collate_unpaired(groups, max_total=9)
    # Group 1 passes over 2, which has its prompt; 4 passes over 0.
    assert batch.completion_ids.squeeze(-1).tolist() == [[10, 11], [11, 13], [12, 13], [13, 14], [14, 11]]
    assert batch.prompt_ids.squeeze(-1).tolist() == [1, 2, 2, 3, 1]


def test_the_second_column_is_cut_to_what_its_prompt_leaves():
    groups = [group(0, [1, 1, 1, 1], [10], 1.0), group(1, [2], [20, 21, 22, 23], -1.0)]
    batch = collate_unpaired(groups, max_total=6)
    assert batch.completion_mask.sum(-1).tolist() == [[1, 2], [4, 1]]
    assert batch.completion_ids[0, 1, :2].tolist() == [20, 21]
    assert batch.completion_ids[1, 0].tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize("prompts", [[[1]], [[1], [1]]])
def test_one_prompt_has_one_column_and_one_warning(prompts):
    groups = [group(number, prompt, [10 + number], -1.0) for number, prompt in enumerate(prompts)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = [collate_unpaired(groups, max_total=9) for _ in range(3)]
    assert [batch.present.shape for batch in batches] == [(len(groups), 1)] * 3
    assert batches[0].reward.tolist() == [[-1.0]] * len(groups)
    assert len(caught) == 1
    assert "only one prompt" in str(caught[0].message)
    assert "data.batch_size" in str(caught[0].message)


def test_pairs_and_scored_completions_give_a_good_and_a_bad_one(tmp_path):
    pairs = [{"prompt": "A", "chosen": "yes", "rejected": "no"}, {"prompt": "B", "chosen": "on", "rejected": "off"}]
    batch, report = read(tmp_path, *pairs)
    assert [columns[0] for columns in texts_of(batch)] == ["yes</s>", "no</s>", "on</s>", "off</s>"]
    assert [columns[1] for columns in texts_of(batch)] == ["on</s>", "on</s>", "yes</s>", "yes</s>"]
    assert batch.reward.tolist() == [[1, 0], [-1, 0], [1, 0], [-1, 0]]
    assert batch.row.tolist() == [0, 0, 1, 1]
    assert (report.kept, report.groups, report.completions) == (2, 4, {"good": 2, "bad": 2})
    scored = [{"prompt": p, "completions": ["m", "w" + p, "b" + p], "rewards": [0, -7, 9]} for p in "AB"]
    batch, _ = read(tmp_path, *scored)
    assert [columns[0] for columns in texts_of(batch)] == ["bA</s>", "wA</s>", "bB</s>", "wB</s>"]
    assert batch.reward[:, 0].tolist() == [1, -1, 1, -1]


def test_rows_without_a_preference_are_dropped_and_a_row_counts_once(tmp_path):
    scored = {"prompt": "A", "completions": ["x", "y"]}
    rows = [{**scored, "rewards": [1, 0]}, {**scored, "rewards": [1, 1]}, {"prompt": "B", "completions": ["x"]}]
    rows[2]["rewards"] = [1]
    _, report = read(tmp_path, *rows, max_dropped=0.7)
    assert {reason: tally.count for reason, tally in report.dropped.items()} == {
        "all rewards equal": 1,
        "fewer than two completions": 1,
    }
    assert (report.read, report.kept, report.lost) == (3, 1, 2)


def test_both_halves_of_a_pair_are_held_out_together(tmp_path):
    data = UnpairedData(str(write_jsonl(tmp_path / "a.jsonl", pair_rows(10))), validation_size=3, batch_size=4)
    data.load(byte_tokenizer())
    train = [number for batch in data.train_dataloader() for number in batch.row.tolist()]
    held = [number for batch in data.val_dataloader() for number in batch.row.tolist()]
    assert (len(train), len(held)) == (14, 6)
    assert set(train).isdisjoint(held)
    report = data.report.as_dict()
    assert (report["train"]["held_out"], report["train"]["kept"]) == (3, 7)
    assert (report["validation"]["read"], report["validation"]["kept"]) == (3, 3)


def test_prompts_come_with_their_own_completion_only(tmp_path):
    data = validating(UnpairedData, tmp_path, [row("A", "a", True), row("A", "b", False), row("B", "c", True)])
    batch = data.prompts(9)
    assert texts_of(batch) == [["a</s>"], ["c</s>"]]


@pytest.mark.parametrize(
    ("label", "shown"),
    [(2, "2"), (-1, "-1"), (0.5, "0.5"), ("true", "text"), (None, "null"), ([1], "a list"), (float("nan"), "nan")],
)
def test_a_bad_label_names_its_place(tmp_path, label, shown):
    expected = rf'rows.jsonl:2: field "label" must be true or false \(or 1 or 0\), not {shown}$'
    with pytest.raises(DataError, match=expected):
        read(tmp_path, row("A", "a", True), row("B", "b", label))


def test_bad_completions_and_empty_ones(tmp_path):
    with pytest.raises(DataError, match=r'rows.jsonl:1: field "completion" must be text or a list of'):
        read(tmp_path, row("A", 3, True))
    _, report = read(tmp_path, row("A", "a", True), row("B", "\n", True), row("C", "c", False), max_dropped=0.5)
    assert report.dropped["empty completion"].places == ["rows.jsonl:2"]


def test_columns_without_labels_show_what_is_wanted(tmp_path):
    with pytest.raises(DataError) as error:
        read(tmp_path, {"question": "A", "completion": "a", "thumbs_up": True})
    assert "found:  question, completion, thumbs_up" in str(error.value)
    assert "wanted: prompt + completion + label; prompt + chosen + rejected;" in str(error.value)
    assert "columns: {prompt: question, label: thumbs_up}" in str(error.value)
    columns = {"prompt": "question", "label": "thumbs_up"}
    rows = [{"question": "A", "completion": "a", "thumbs_up": True}, {"question": "B", "completion": "b"}]
    with pytest.raises(DataError, match=r'rows.jsonl:2: field "label" is missing'):
        read(tmp_path, *rows, columns=columns)
    batch, _ = read(tmp_path, rows[0], columns=columns)
    assert batch.reward.tolist() == [[1]]
