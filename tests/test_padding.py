"""How much of a forward pass is padding on real, uneven data."""

from __future__ import annotations

from pathlib import Path

from lit_align.data import PreferenceData
from lit_align.layout import tree_rows
from lit_align.models import load_tokenizer
from lit_align.settings import PairSettings


def most_padding(model: str, hidden_size: int, sizes: tuple[int, ...], **options: str) -> float:
    """Largest share of cells without a token, over an epoch, for some batch sizes, sorted by length or not."""
    data, shares = PreferenceData(**options), []  # type: ignore[arg-type]
    data.load(load_tokenizer(PairSettings(model)))
    for data.batch_size in sizes:
        for data.length_window in (1, 16):
            empty, cells = sum(tree_rows(batch, hidden_size).cells for batch in data.train_dataloader()).tolist()  # type: ignore[union-attr]
            shares.append(empty / cells)
    return max(shares)


def test_the_stories_leave_less_than_a_tenth_empty() -> None:
    """At the data's default batch size, and at that of the configs."""
    assert 0 < most_padding("stories", 256, (8, 16)) < 0.1


def test_dialogues_of_uneven_length_leave_less_than_a_tenth_empty(shared_data: Path) -> None:
    pairs = str(shared_data / "anthropic_hh_harmless_test.jsonl.gz")
    assert 0 < most_padding(str(shared_data / "stories15m"), 288, (8,), dataset=pairs) < 0.1
