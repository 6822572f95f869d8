"""What every data module must do, whatever it makes of its rows."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from lightning import LightningDataModule

from lit_align import data as modules
from lit_align.batch import CompletionBatch
from lit_align.data import Demonstrations, PreferenceData, ScoredGroups, UnpairedData
from lit_align.data.completions import CompletionData
from tests.data.conftest import byte_tokenizer, pair_rows, write_jsonl

# Those that bring all their completions along.
KINDS = [getattr(modules, name) for name in modules.__all__ if name not in {"OnPolicyData", "MixedData"}]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request) -> type[CompletionData]:
    return request.param


def scored_rows(count: int) -> list[dict]:
    """Four completions of different lengths, the last of which is the best and the first the worst."""
    return [
        {"prompt": f"Q{n:03d}", "completions": ["a", "bb", "ccc" * (n % 3 + 1), "dddd"], "rewards": [0, 1, 2, 3]}
        for n in range(count)
    ]


def loaded(kind: type[CompletionData], path: Path, rows: list[dict], **options) -> CompletionData:
    data = kind(str(write_jsonl(path / "rows.jsonl", rows)), **options)
    data.load(byte_tokenizer())
    return data


def numbers(batches) -> list[int]:
    return [number for batch in batches for number in batch.row.tolist()]


def equal(first: CompletionBatch, second: CompletionBatch) -> bool:
    pairs = zip(first, second, strict=True)
    return all(one.equal(other) if one is not None else other is None for one, other in pairs)


def test_classes_are_abstract_or_final(kind):
    assert kind.__bases__ == (CompletionData,)
    with pytest.raises(TypeError, match="abstract"):
        CompletionData()


@pytest.mark.parametrize("rows", [pair_rows(20), scored_rows(20)], ids=["pairs", "scored"])
def test_rows_are_read_held_out_and_reported(kind, tmp_path, rows):
    data = loaded(kind, tmp_path, rows, validation_size=5, batch_size=4)
    train, held = set(numbers(data.train_dataloader())), set(numbers(data.val_dataloader()))
    assert train.isdisjoint(held)
    assert sorted(train | held) == list(range(20))
    assert len(held) == 5
    parts = data.report.as_dict()
    assert [parts["train"][name] for name in ("read", "kept", "held_out")] == [20, 15, 5]
    assert [parts["validation"][name] for name in ("read", "kept")] == [5, 5]
    assert data.train_batches() == len(data.train_dataloader()) == len(list(data.train_dataloader()))
    assert set(numbers([data.prompts(3)])) <= held
    assert len(data.prompts(99).row) == 5
    assert data.oracle is None


def test_validation_of_its_own_comes_from_the_folder(kind, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", scored_rows(6))
    write_jsonl(tmp_path / "validation.jsonl", scored_rows(3))
    data = kind(str(tmp_path))
    data.load(byte_tokenizer())
    assert set(numbers(data.train_dataloader())) == set(range(6))
    assert set(numbers(data.val_dataloader())) == set(range(3))
    # Each prompt of validation is trained on; a row that gives several groups is counted once.
    assert data.report.parts["validation"].noted["prompt also in training"].count == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_continue_where_another_run_stopped(kind, tmp_path, workers):
    def loader():
        return loaded(kind, tmp_path, scored_rows(9), validation_size=0, batch_size=2, num_workers=workers)

    whole = list(loader().train_dataloader())
    stopped = loader().train_dataloader()
    batches = iter(stopped)
    seen = [next(batches), next(batches)]
    state = stopped.state_dict()
    del batches
    resumed = loader().train_dataloader()
    resumed.load_state_dict(state)
    assert all(equal(*both) for both in zip(whole, [*seen, *resumed], strict=True))


def test_what_each_makes_of_the_same_scored_row(tmp_path):
    made = {kind: loaded(kind, tmp_path, scored_rows(8), validation_size=0).prompts(8).present.shape for kind in KINDS}
    assert made == {PreferenceData: (8, 2), ScoredGroups: (8, 4), UnpairedData: (8, 1), Demonstrations: (8, 1)}


def test_the_command_line_knows_and_explains_every_argument(kind):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    arguments = {*inspect.signature(CompletionData).parameters, *inspect.signature(kind).parameters} - {"kwargs"}
    config = parser.parse_args([f"--data=lit_align.data.{kind.__name__}", "--data.batch_size=3", "--data.seed=7"])
    assert set(config.data.init_args.keys()) == arguments
    data = parser.instantiate_classes(config).data
    assert type(data) is kind
    assert (data.batch_size, data.seed) == (3, 7)
    missing = [
        action.dest
        for action in _arguments_of(kind)
        if action.dest in arguments and not (action.help or "").replace("%(default)s", "").strip()
    ]
    assert missing == []


def _arguments_of(kind: type[CompletionData]):
    parser = ArgumentParser()
    parser.add_class_arguments(kind)
    return parser._actions


def test_arguments_of_one_kind_are_checked_by_the_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    for value in ("best_and_worst", "all_pairs", "best", "ranked"):
        config = parser.parse_args(["--data=lit_align.data.ScoredGroups", f"--data.select={value}"])
        assert parser.instantiate_classes(config).data.select == value
    with pytest.raises(Exception, match="bestest"):
        parser.parse_args(["--data=lit_align.data.ScoredGroups", "--data.select=bestest"])
    config = parser.parse_args(["--data=lit_align.data.Demonstrations", "--data.threshold=0.5"])
    assert parser.instantiate_classes(config).data.threshold == 0.5
