"""``compare``: the table and the pictures of runs whose files are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lit_align.__main__ import main
from lit_align.commands.compare import names, read


def make(folder: Path, objective: str, beta: float, samples: bool = True) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model:\n  class_path: x.{objective}\n  init_args: {{beta: {beta}}}\n")
    rows = [
        "epoch,step,train/beta,train/rewards/margins,val/rewards/margins",
        f"0,4,{beta},0.5,",
        f"0,9,{beta / 2},0.75,0.6",
    ]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    before = {"step": 0, "reward": {"mean": 0.1, "standard_error": 0.02}, "ended": 0.5, "tokens": 20.0}
    after = {**before, "step": 10, "reward": {"mean": 0.4, "standard_error": None}, "tokens": 25.0}
    draws = [before, after | {"kl": {"mean": 3.0, "standard_error": 0.25}}]
    if samples:
        (folder / "samples.json").write_text(json.dumps({"draws": draws}))


def test_the_table_and_the_pictures(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    make(place / "a", "DPO", 0.5)
    make(place / "b", "IPO", 0.25, samples=False)
    assert main(["compare", "a", "b", "--out", "pictures"]) == 0
    out = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    for words in ("DPO", "10", "0.100 ± 0.020 → 0.400", "3.00 ± 0.25", "0.5 → 0.25", "20.0 → 25.0", "50% → 50%", "0.6"):
        assert words in lines["a"]
    assert "IPO" in lines["b"]
    assert "–" in lines["b"]
    found = {path.name for path in Path("pictures").iterdir()}
    assert found == {"reward_kl.png", "margins.png", "beta.png", "lengths.png"}
    for path in Path("pictures").iterdir():
        with Image.open(path) as picture:
            assert picture.size > (400, 300)


def test_what_a_run_tells_is_read_as_it_stands_there(place: Path) -> None:
    make(place / "a", "DPO", 0.5)
    found = read(place / "a", "a")
    assert found.logged["train/beta"] == [(5, 0.5), (10, 0.25)]
    assert found.last("rewards/margins") == 0.6
    assert found.drawn("kl") == [(0, 0.0), (10, 3.0)]
    assert found.drawn("reward") == [(0, 0.1), (10, 0.4)]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["runs/dpo/1", "runs/ipo/2"], ["1", "2"]),
        (["runs/dpo/1", "runs/ipo/1"], ["dpo/1", "ipo/1"]),
        (["x/y", "x/y"], ["y", "y (2)"]),
    ],
)
def test_names_are_as_short_as_can_be(paths: list[str], expected: list[str]) -> None:
    assert names(paths) == expected


def test_mistakes_get_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(place / "a", "DPO", 0.5)
    make(place / "b", "DPO", 0.5)
    Path("b/samples.json").write_text("{")
    for args, words in (
        (["a"], "two or more"),
        (["a", "none"], "none is no run folder"),
        (["a", "b"], "b: a file of the run cannot be read"),
        (["a", "b", "--uot", "x"], "did you mean out?"),
        ([], "RUNS is missing"),
    ):
        assert main(["compare", *args]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert len(message.strip().splitlines()) == 1


def test_half_a_row_at_the_end_is_left_out(place: Path) -> None:
    make(place / "a", "DPO", 0.5)
    with Path("a/metrics.csv").open("a") as file:
        file.write("0,14,0.1")
    assert read(place / "a", "a").logged["train/beta"] == [(5, 0.5), (10, 0.25)]
