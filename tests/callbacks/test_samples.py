"""Samples: the numbers against a hand calculation, and a training run that does not notice them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lit_align.batch import Sampling
from lit_align.callbacks.draws import draw, mean_and_error
from lit_align.callbacks.run_folder import RunFolder
from lit_align.callbacks.samples import SampleTable
from tests.callbacks.toy import ToyData, ToyModule, trainer


class JudgedData(ToyData):
    """The reward of a completion is its length in letters, of prompt "b" twice that."""

    @staticmethod
    def oracle(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [len(text) * (2.0 if prompt == "b" else 1.0) for prompt, text in zip(prompts, completions, strict=True)]


def run(tmp_path: Path, table: SampleTable, data: ToyData, **options: object) -> tuple[ToyModule, list[dict]]:
    module = ToyModule()
    trainer(RunFolder(tmp_path / "run"), table, **options).fit(module, datamodule=data)
    file = tmp_path / "run" / "samples.jsonl"
    return module, [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_mean_and_standard_error_count_a_prompt_once() -> None:
    # Prompt means 2, 4 and 9: mean 5, variance ((-3)² + (-1)² + 4²) / 2 = 13.
    found = mean_and_error(torch.tensor([[1.0, 3.0], [4.0, 4.0], [8.0, 10.0]]))
    assert found == {"mean": pytest.approx(5.0), "standard_error": pytest.approx(math.sqrt(13 / 3))}
    assert mean_and_error(torch.tensor([[1.0, 3.0]])) == {"mean": 2.0, "standard_error": None}


def test_before_and_after_are_drawn_judged_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = SampleTable(prompts=2, completions=2, show=1)
    _, rows = run(tmp_path, table, JudgedData())
    before, after = [row for row in rows if row["step"] == 0], [row for row in rows if row["step"] == 12]
    assert [row["completion"] for row in before] == [row["completion"] for row in after] == ["a", "aa", "b", "bb"]
    assert [row["reward"] for row in after] == [1, 2, 2, 4]
    assert "kl" not in before[0]
    # Token KL is 1 for prompt a and 2 for prompt b; completion k has k letters and an end of sequence.
    assert [row["kl"] for row in after] == [2, 3, 4, 6]
    assert [row["tokens"] for row in before + after] == [1, 2, 1, 2, 2, 3, 2, 3]
    summaries = json.loads((tmp_path / "run" / "samples.json").read_text())["draws"]
    # Prompt means: rewards 1.5 and 3, divergences 2.5 and 5; the error of two values is half their distance.
    assert summaries[1]["reward"] == {"mean": pytest.approx(2.25), "standard_error": pytest.approx(0.75)}
    assert summaries[1]["kl"] == {"mean": pytest.approx(3.75), "standard_error": pytest.approx(1.25)}
    assert (summaries[0]["tokens"], summaries[1]["tokens"]) == (1.5, 2.5)
    out = capsys.readouterr().out
    assert "reward 2.250 ± 0.750 -> 2.250 ± 0.750, gain 0.000 ± 0.000" in out
    assert "KL(policy || reference) 3.750 ± 1.250 nats" in out


@pytest.mark.parametrize(("options", "draws"), [({"prompts": 0}, 0), ({"prompts": 1}, 1), ({"completions": 3}, 1)])
def test_a_run_that_goes_on_with_other_samples_comes_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, int], draws: int
) -> None:
    """What it began with is then no comparison."""
    first = SampleTable(**{"prompts": 2, "completions": 2})
    run(tmp_path / "first", first, JudgedData())
    assert "gain" in capsys.readouterr().out
    table = SampleTable(**{"prompts": 2, "completions": 2, "every_n_steps": 100} | options)
    table.load_state_dict(first.state_dict())
    known = len(table.summaries)
    run(tmp_path / "second", table, JudgedData())
    assert len(table.summaries) == known + draws
    assert "gain" not in capsys.readouterr().out


def test_many_prompts_are_scored_in_parts_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_align.callbacks.draws.PROMPTS_AT_ONCE", 3)
    module = ToyModule()
    drawn = draw(module, ToyData().prompts(7), 2, Sampling(), reference=False)
    assert module.pair.scored == [3, 3, 1]
    assert drawn.prompts == list("abcdefg")
    assert drawn.completions == [[letter, letter * 2] for letter in "abcdefg"]
    assert drawn.kl is not None
    assert drawn.kl[:, 0].tolist() == [2.0 * n for n in range(1, 8)]


def test_training_does_not_notice_the_samples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sampled, _ = run(tmp_path / "with", SampleTable(prompts=3, every_n_steps=2), ToyData())
    torch.manual_seed(0)
    plain, rows = run(tmp_path / "without", SampleTable(prompts=0), ToyData())
    assert sampled.draws == plain.draws
    assert rows == []
    assert plain.pair.calls == []
    # Drawn without gradient in eval mode; afterwards everything is in train mode again.
    assert all(call[1:] == (False, False) for call in sampled.pair.calls)
    assert sampled.pair.dropout.training


def test_draws_in_between_come_once_at_each_multiple(tmp_path: Path) -> None:
    _, rows = run(tmp_path, SampleTable(prompts=1, every_n_steps=2), ToyData(), accumulate_grad_batches=3)
    assert [row["step"] for row in rows] == [0, 2, 4, 4]  # the last of these is the draw after training


def test_a_module_that_writes_no_text_is_not_sampled(tmp_path: Path) -> None:
    class Judge(ToyModule):
        generates = False

    module = Judge()
    trainer(RunFolder(tmp_path / "run"), SampleTable(prompts=2, every_n_steps=2)).fit(module, datamodule=ToyData())
    assert module.pair.calls == []
    assert not list((tmp_path / "run").glob("samples*"))


def test_text_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Markup(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer.decode = lambda ids, skip_special_tokens=False: "[bold]x[/nothing]"  # type: ignore[method-assign]

    trainer(SampleTable(prompts=1)).fit(Markup(), datamodule=ToyData())
    assert "[bold]x[/nothing]" in capsys.readouterr().out
