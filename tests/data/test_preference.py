from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import lit_align.data.completions
from lit_align.assets import resolve
from lit_align.batch import CompletionBatch
from lit_align.data import PreferenceData
from lit_align.data.rows import DataError
from lit_align.protocols import Reward
from tests.data.conftest import CHATML, byte_tokenizer, pair_rows, write_jsonl

HH = "anthropic_hh_harmless_test.jsonl.gz"


@pytest.fixture
def pairs(tmp_path):
    return str(write_jsonl(tmp_path / "pairs.jsonl", pair_rows(20)))


def loaded(dataset: str, tokenizer=None, **options) -> PreferenceData:
    data = PreferenceData(dataset, **options)
    data.load(tokenizer or byte_tokenizer())
    return data


def rows(batches) -> list[int]:
    return [row for batch in batches for row in batch.row.tolist()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_length": 1}, ["data.max_length=1", "at least 2"]),
        ({"max_length": 8, "max_prompt_length": 8}, ["data.max_prompt_length=8", "from 1 to 7", "leave it out"]),
        ({"max_prompt_length": 0}, ["data.max_prompt_length=0", "from 1 to 511"]),
        ({"batch_size": 0}, ["data.batch_size=0", "at least 1"]),
        ({"validation_batch_size": 0}, ["data.validation_batch_size=0", "leave it out to use batch_size"]),
        ({"max_rows": 0}, ["data.max_rows=0", "leave it out to read all"]),
        ({"num_workers": -1}, ["data.num_workers=-1", "0 collates in the main process"]),
        ({"validation_size": -0.1}, ["data.validation_size=-0.1", "a share in (0, 1)", "0 for no validation"]),
        ({"validation_size": 1.0}, ["data.validation_size=1.0", "a share in (0, 1)"]),
        ({"max_dropped": 1.5}, ["data.max_dropped=1.5", "0 to 1"]),
    ],
)
def test_arguments_out_of_range_say_value_range_and_remedy(options, expected):
    with pytest.raises(DataError) as error:
        PreferenceData(**options)
    for part in expected:
        assert part in str(error.value)


def test_the_prompt_gets_half_of_a_length_by_default():
    assert PreferenceData(max_length=100).limits == (100, 50)
    assert PreferenceData(max_length=100, max_prompt_length=99).limits == (100, 99)


def test_a_file_is_split_by_prompt_and_reported(pairs):
    data = loaded(pairs, validation_size=5, batch_size=4)
    train, held = rows(data.train_dataloader()), rows(data.val_dataloader())
    assert len(held) == 5
    assert sorted(train + held) == list(range(20))
    parts = data.report.as_dict()
    assert [parts["train"][name] for name in ("read", "kept", "held_out")] == [20, 15, 5]
    assert (parts["validation"]["kept"], parts["validation"]["source"]) == (5, "pairs.jsonl, held out")
    assert rows(loaded(pairs, validation_size=5).val_dataloader()) == held
    assert rows(loaded(pairs, validation_size=5, seed=1).val_dataloader()) != held


def test_no_validation_where_none_is_wanted(pairs):
    data = loaded(pairs, validation_size=0)
    assert data.val_dataloader() == []
    assert set(data.report.parts) == {"train"}
    assert data.prompts(2).row.tolist() == [0, 1]


def test_a_folder_brings_its_own_validation(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", pair_rows(6))
    write_jsonl(tmp_path / "validation.jsonl", pair_rows(3))
    data = loaded(str(tmp_path))
    assert sorted(rows(data.train_dataloader())) == list(range(6))
    assert rows(data.val_dataloader()) == [0, 1, 2]
    # These three prompts are trained on as well, and the report says so.
    assert data.report.parts["validation"].noted["prompt also in training"].count == 3
    held = loaded(str(tmp_path), validation_split=None, validation_size=2)
    assert len(rows(held.train_dataloader())) == 4
    none = loaded(str(tmp_path), validation_split="test", validation_size=2)
    assert len(rows(none.val_dataloader())) == 2


def test_a_validation_dataset_of_its_own(tmp_path, pairs):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "new", "chosen": "a", "rejected": "b"}])
    data = loaded(pairs, validation_dataset=str(other))
    assert len(rows(data.train_dataloader())) == 20
    assert data.report.parts["validation"].source == "other.jsonl"
    assert data.report.parts["validation"].noted == {}


@pytest.mark.parametrize(("validation_split", "asked"), [("test", ["train", "test"]), (None, ["train"])])
def test_only_the_wanted_splits_of_a_hub_dataset_are_asked_for(monkeypatch, validation_split, asked):
    datasets = pytest.importorskip("datasets")
    splits = []

    def load_dataset(path, name=None, split=None):
        splits.append(split)
        return datasets.Dataset.from_list(pair_rows(20))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded("owner/pairs", validation_split=validation_split)
    assert splits == asked


def test_columns_and_max_rows_reach_the_reader(tmp_path):
    renamed = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in pair_rows(9)]
    path = str(write_jsonl(tmp_path / "a.jsonl", renamed))
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    data = loaded(path, columns=columns, max_rows=4, validation_size=0)
    assert sorted(rows(data.train_dataloader())) == [0, 1, 2, 3]


def test_scored_completions_become_their_best_and_worst(tmp_path):
    scored = [{"prompt": f"Q{n}", "completions": ["mid", "worst", "best"], "rewards": [0, -1 - n, 2]} for n in range(4)]
    tied = {"prompt": "Q", "completions": ["a", "b"], "rewards": [1, 1]}
    tokenizer = byte_tokenizer()
    data = loaded(str(write_jsonl(tmp_path / "a.jsonl", [*scored, tied])), tokenizer, validation_size=0)
    batch = next(iter(data.train_dataloader()))
    assert batch.reward.tolist() == [[2, -1 - row] for row in batch.row.tolist()]
    columns = zip(batch.completion_ids[0], batch.completion_mask[0], strict=True)
    texts = [tokenizer.decode(ids[mask]) for ids, mask in columns]
    assert texts == ["best</s>", "worst</s>"]
    assert data.report.parts["train"].dropped["all rewards equal"].places == ["a.jsonl:5"]


def test_pairs_have_no_rewards(pairs):
    batch = next(iter(loaded(pairs).train_dataloader()))
    assert isinstance(batch, CompletionBatch)
    assert batch.reward is None
    assert bool(batch.present.all())


def test_padding_follows_the_tokenizer_and_masks_do_not(pairs):
    for tokenizer, pad in ((byte_tokenizer(pad_token="<s>"), 256), (byte_tokenizer(), 257)):
        batch = next(iter(loaded(pairs, tokenizer).train_dataloader()))
        padding = batch.completion_ids[~batch.completion_mask]
        assert len(padding) > 0
        assert set(padding.tolist()) == {pad}
        # Every completion ends, once, where its mask does.
        assert torch.equal((batch.completion_ids * batch.completion_mask == 257).sum(-1), torch.ones(8, 2).long())


def test_too_much_lost_is_an_error_unless_allowed(tmp_path):
    same = {"prompt": "Q", "chosen": "a", "rejected": "a"}
    path = str(write_jsonl(tmp_path / "a.jsonl", [*pair_rows(7), same, same, same]))
    with pytest.raises(DataError, match=r"3 of 10 rows \(30%\) were dropped, more than max_dropped=0.2"):
        loaded(path)
    assert loaded(path, max_dropped=0.3, validation_size=0).report.parts["train"].kept == 7
    empty = str(write_jsonl(tmp_path / "b.jsonl", [same]))
    with pytest.raises(DataError, match="nothing is left of 1 rows"):
        loaded(empty, max_dropped=1.0)


def test_prompts_are_distinct_and_keep_their_completions(tmp_path):
    repeated = [row for row in pair_rows(4) for _ in range(2)]
    write_jsonl(tmp_path / "train.jsonl", pair_rows(9))
    write_jsonl(tmp_path / "validation.jsonl", repeated)
    batch = loaded(str(tmp_path)).prompts(3)
    assert batch.row.tolist() == [0, 2, 4]
    assert batch.completion_ids.shape[:2] == (3, 2)
    assert len(loaded(str(tmp_path)).prompts(99).row) == 4


SHARES = [(8, 1, 3), (8, 2, 2), (3, 2, 4), (19, 2, 1), (1, 3, 6)]


@pytest.mark.parametrize(("batch_size", "world_size", "expected"), SHARES)
def test_train_batches_counts_what_each_rank_gets(pairs, batch_size, world_size, expected):
    data = loaded(pairs, batch_size=batch_size, validation_size=0)
    # 20 groups: 3 x 8; 2 x 16; 3 x 6 and 2 left for two ranks; one of 38; 6 x 3 and 2 left, too few for three.
    assert data.train_batches(world_size) == expected
    assert world_size > 1 or len(data.train_dataloader()) == expected


def test_use_before_setup_is_an_error():
    for call in (PreferenceData().train_batches, lambda: PreferenceData().prompts(1)):
        with pytest.raises(RuntimeError, match="call setup"):
            call()
    with pytest.raises(RuntimeError, match=r"load\(tokenizer\)"):
        PreferenceData().setup("fit")


def test_sharding_twice_is_refused(pairs):
    data = PreferenceData(pairs)
    data.trainer = SimpleNamespace(world_size=2, _accelerator_connector=SimpleNamespace(use_distributed_sampler=True))
    with pytest.raises(DataError, match=r"Trainer\(use_distributed_sampler=False\)"):
        data.setup("fit")


def test_a_length_beyond_the_tokenizer_warns(pairs):
    with pytest.warns(UserWarning, match="max_length=512 is more than the 100 tokens"):
        loaded(pairs, byte_tokenizer(model_max_length=100))


def test_importing_and_building_loads_nothing_of_transformers_or_datasets():
    code = (
        "import sys, lightning; before = set(sys.modules);"  # Lightning's metrics import a part of transformers
        "from lit_align.data import PreferenceData; PreferenceData('x.jsonl');"
        "heavy = ('transformers', 'datasets', 'pyarrow', 'peft', 'tokenizers');"
        "print(sorted(name for name in set(sys.modules) - before if name.split('.')[0] in heavy))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_report_is_saved(tmp_path, pairs):
    data = loaded(pairs)
    data.save_report(tmp_path / "data_report.json")
    assert json.loads((tmp_path / "data_report.json").read_text()) == data.report.as_dict()


class Length:
    """Judges by length."""

    def __call__(self, prompts, completions):
        return [float(len(completion)) for completion in completions]


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A stand-in for the packaged folder, which also holds a model's files."""
    folder = tmp_path / "stories"
    folder.mkdir()
    scored = {"completions": [" a", " bb", " ccc", " dd"], "rewards": [0, 1, 2, 1]}
    rows = [{"prompt": f"Once {n}", **scored} for n in range(6)]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "validation.jsonl", rows[:2])
    (folder / "about.json").write_text(json.dumps({"oracle": f"{__name__}.Length"}))
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(lit_align.data.completions, "resolve", lambda name: str(folder) if name == "stories" else name)
    return folder


def test_the_packaged_dataset_has_an_oracle_and_no_other_has(packaged, pairs):
    data = loaded("stories")
    assert isinstance(data.oracle, Reward)
    assert list(data.oracle(["Q"], ["four"])) == [4.0]
    assert loaded(pairs).oracle is None
    assert loaded(str(packaged)).oracle is None  # a user's folder never names code to run
    assert data.report.parts["validation"].kept == 2


def test_the_stories_are_read():
    folder = resolve("stories")
    transformers = pytest.importorskip("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except OSError:
        pytest.skip("the packaged stories are not built")
    data = loaded("stories", tokenizer)
    train = data.report.parts["train"]
    assert train.kept + train.lost == train.read
    assert train.noted == {}  # nothing of the packaged data is cut
    batch = next(iter(data.train_dataloader()))
    assert bool((batch.reward[:, 0] > batch.reward[:, 1]).all())
    assert batch.prompt_ids.max() < len(tokenizer)
    assert isinstance(data.oracle, Reward)


def test_every_hh_pair_parses(shared_data):
    for tokenizer in (byte_tokenizer(), byte_tokenizer(CHATML, eos="<|im_end|>")):
        data = loaded(str(shared_data / HH), tokenizer, max_length=4096, validation_size=0)
        part = data.report.parts["train"]
        assert part.read == 2312
        # Counted apart: 4 rows have a completion of white space only.
        assert {reason: tally.count for reason, tally in part.dropped.items()} == {
            "prompts differ": 5,
            "empty completion": 4,
        }
        assert part.kept == 2303
