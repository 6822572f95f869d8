from __future__ import annotations

import json

import pytest
import torch

from lit_align.data.collate import Group
from lit_align.data.report import DataReport, SplitReport
from lit_align.data.rows import DataError


def group(row: int, prompt: int, chosen: int, rejected: int) -> Group:
    lengths = (prompt, chosen, rejected)
    ids = [torch.zeros(length, dtype=torch.int32) for length in lengths]
    return Group(row, ids[0], ids[1:], None)


def filled() -> SplitReport:
    report = SplitReport("d.jsonl", read=10)
    for line in range(1, 8):
        report.drop("identical pair", f"d.jsonl:{line}")
    report.note("prompt cut on the left", "d.jsonl:9")
    report.measure([group(7, 5, 2, 4), group(8, 1, 4, 8), group(9, 3, 6, 4)])
    return report


def test_counts_places_and_lengths():
    part = filled().as_dict()
    assert (part["read"], part["kept"]) == (10, 3)
    assert part["dropped"] == {
        "identical pair": {"count": 7, "places": ["d.jsonl:1", "d.jsonl:2", "d.jsonl:3", "d.jsonl:4", "d.jsonl:5"]}
    }
    assert part["noted"] == {"prompt cut on the left": {"count": 1, "places": ["d.jsonl:9"]}}
    assert (part["tokens"]["prompt"]["min"], part["tokens"]["prompt"]["median"], part["tokens"]["prompt"]["max"]) == (
        1,
        3,
        5,
    )
    assert part["tokens"]["rejected"]["max"] == 8
    assert part["length_ratio"] == pytest.approx(12 / 16)


def test_the_report_is_saved_as_json_and_rendered(tmp_path):
    report = DataReport({"train": filled()})
    report.save(tmp_path / "run" / "data_report.json")
    assert json.loads((tmp_path / "run" / "data_report.json").read_text()) == report.as_dict()
    table = report.render()
    assert "identical pair: 7 (d.jsonl:1, :2, :3, :4, :5, ...)" in table
    assert "prompt cut on the left: 1 (d.jsonl:9)" in table
    assert "chosen/rejected 0.75" in table
    assert table.splitlines()[1].split()[:4] == ["train", "10", "3", "7"]


def test_too_many_dropped_rows_are_an_error_with_share_limit_and_reasons():
    with pytest.raises(DataError) as error:
        filled().check(0.2)
    message = str(error.value)
    assert "d.jsonl: 7 of 10 rows (70%) were dropped, more than max_dropped=0.2 allows" in message
    assert "set max_dropped (0 to 1) higher" in message
    assert "identical pair: 7" in message
    filled().check(0.7)


def test_nothing_left_is_an_error_even_if_any_loss_is_accepted():
    report = SplitReport("d.jsonl", read=2)
    report.drop("empty completion", "d.jsonl:1")
    report.drop("identical pair", "d.jsonl:2")
    with pytest.raises(DataError) as error:
        report.check(1.0)
    assert "nothing is left of 2 rows" in str(error.value)
    assert "empty completion: 1 (d.jsonl:1)" in str(error.value)
    assert "identical pair: 1 (d.jsonl:2)" in str(error.value)


def test_rows_groups_and_parts_are_counted_apart():
    report = SplitReport("d.jsonl", read=3)
    ids = [torch.zeros(length, dtype=torch.int32) for length in (4, 6, 2)]
    groups = [Group(0, ids[0], [ids[1]], None), Group(0, ids[0], [ids[2]], None), Group(2, ids[0], [ids[2]], None)]
    report.measure(groups, lambda groups: {"good": [ids[1]], "bad": [ids[2], ids[2]]})
    part = report.as_dict()
    assert (part["kept"], part["groups"], part["completions"]) == (2, 3, {"good": 1, "bad": 2})
    assert part["length_ratio"] == pytest.approx(3.0)
    table = DataReport({"train": report}).render()
    assert "median/p99/max of prompt, good, bad" in table
    assert "4/4/4  6/6/6  2/2/2   good/bad 3.00" in table
    assert "from d.jsonl, 3 groups, 1 good, 2 bad" in table


def test_groups_of_one_have_no_rejected_completion():
    one = torch.zeros(3, dtype=torch.int32)
    report = SplitReport("d.jsonl", read=1)
    report.measure([Group(0, one, [one], None)])
    assert (report.completions, report.length_ratio) == ({"chosen": 1}, None)
    other = SplitReport("e.jsonl", read=1)
    other.measure([group(0, 1, 2, 3)])
    assert "3/3/3  3/3/3  -" in DataReport({"train": report, "validation": other}).render()


def test_what_was_left_out_is_shown_and_not_lost():
    report = SplitReport("d.jsonl", read=4)
    for line in (1, 2, 3):
        report.leave_out("labelled bad", f"d.jsonl:{line}")
    report.check(0.0)
    assert report.lost == 0
    assert report.as_dict()["left_out"]["labelled bad"]["count"] == 3
    assert "left out, labelled bad: 3 (d.jsonl:1, :2, :3)" in DataReport({"train": report}).render()
    report.drop("empty completion", "d.jsonl:4")
    with pytest.raises(DataError, match="nothing is left of 4 rows") as error:
        report.check(1.0)
    assert "labelled bad: 3" in str(error.value)
    assert "empty completion: 1" in str(error.value)
