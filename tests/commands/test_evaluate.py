"""``evaluate`` on the real command line: its figures follow from the completions it writes down."""

from __future__ import annotations

import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lit_align.__main__ import main
from lit_align.commands import drawing
from lit_align.commands.runs import find_run
from tests.commands.conftest import fit
from tests.data.conftest import write_jsonl

LETTERS = "tests.commands.conftest.letters"


def evaluate(run: Path, *options: str, reward: str | None = LETTERS) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures and the completions."""
    out = Path("out.json")
    judge = [] if reward is None else ["--reward", reward]
    assert main(["evaluate", str(run), "--out", str(out), "--max_new_tokens", "6", *judge, *options]) == 0
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    found = json.loads(out.read_text())
    out.unlink()
    out.with_suffix(".jsonl").unlink()
    return found, rows


def by_prompt(rows: list[dict[str, Any]], model: str, name: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["model"] == model:
            found.setdefault(row["prompt"], []).append(row[name])
    return found


def test_the_figures_follow_from_the_completions(
    trained: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, rows = evaluate(trained, "--completions", "3")
    for model in ("reference", "policy"):
        rewards = by_prompt(rows, model, "reward")
        assert len(rewards) == 8
        assert all(len(values) == 3 for values in rewards.values())
        means = [statistics.fmean(values) for values in rewards.values()]
        figure = found["candidates"][model]["reward"]
        assert figure["mean"] == pytest.approx(statistics.fmean(means))
        assert figure["standard_error"] == pytest.approx(statistics.stdev(means) / 8**0.5)
        assert all(row["reward"] == len(row["completion"]) for row in rows)
    policy, reference = (by_prompt(rows, model, "reward") for model in ("policy", "reference"))
    wins = [
        statistics.fmean((a > b) + (a == b) / 2 for a in policy[prompt] for b in reference[prompt]) for prompt in policy
    ]
    (first,) = [one for one in found["comparisons"] if (one["first"], one["second"]) == ("policy", "reference")]
    assert first["win_rate"]["mean"] == pytest.approx(statistics.fmean(wins))
    kl = [statistics.fmean(values) for values in by_prompt(rows, "policy", "kl").values()]
    assert found["candidates"]["policy"]["kl"]["mean"] == pytest.approx(statistics.fmean(kl), rel=1e-5)
    assert statistics.fmean(kl) > 0.1
    assert "win rate" in capsys.readouterr().out


def test_the_chosen_completions_are_those_of_the_rows(trained: Path, place: Path) -> None:
    """They are " yes" and up to four signs, and an end of sequence."""
    found, rows = evaluate(trained)
    numbers = [int(prompt[1:]) for prompt in by_prompt(rows, "policy", "reward")]
    chosen = found["candidates"]["chosen"]
    assert chosen["reward"]["mean"] == pytest.approx(statistics.fmean(4 + n % 5 for n in numbers))
    assert chosen["tokens"]["mean"] == pytest.approx(statistics.fmean(5 + n % 5 for n in numbers))


def test_the_best_of_n_is_the_best_of_what_was_drawn(trained: Path, place: Path) -> None:
    found, rows = evaluate(trained, "--best_of", "5")
    for model in ("reference", "policy"):
        best = [max(values) for values in by_prompt(rows, model, "reward").values()]
        assert found["candidates"][f"{model}, best of 5"]["reward"]["mean"] == pytest.approx(statistics.fmean(best))
    assert {"policy, best of 5", "reference, best of 5"} < {one["first"] for one in found["comparisons"]}


def test_draws_in_parts_are_all_the_draws(trained: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two columns of three prompts at a time; which prompts are drawn together changes nothing."""
    monkeypatch.setattr(drawing, "TOKENS_AT_ONCE", 12)
    _, together = evaluate(trained, "--completions", "5")
    monkeypatch.setattr(drawing, "PROMPTS_AT_ONCE", 3)
    _, apart = evaluate(trained, "--completions", "5")
    assert [row["completion"] for row in apart] == [row["completion"] for row in together]
    texts = by_prompt(apart, "policy", "completion")
    assert [len(of) for of in texts.values()] == [5] * 8
    assert sum(len(set(of)) for of in texts.values()) > 30
    assert all(row["reward"] == len(row["completion"]) for row in apart)


def test_it_repeats_itself_and_follows_the_seed(trained: Path, place: Path) -> None:
    once, again = evaluate(trained), evaluate(trained)
    assert once == again
    assert evaluate(trained, "--seed", "1")[1] != once[1]


def test_the_models_draw_independently(base: str, place: Path) -> None:
    """A policy that is its reference writes other texts, and neither wins."""
    run = fit(base, place, model__optim__learning_rate=1e-12)
    found, rows = evaluate(run, "--completions", "2")
    assert by_prompt(rows, "policy", "completion") != by_prompt(rows, "reference", "completion")
    assert found["candidates"]["policy"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)


def test_prompts_on_which_the_reward_fails_count_for_nobody(trained: Path, place: Path) -> None:
    write_jsonl(Path("asked.jsonl"), [{"prompt": text} for text in ("a0", "a1", "a2", "a2")])
    found, rows = evaluate(trained, "--dataset", "asked.jsonl", reward="tests.commands.conftest.picky")
    assert found["prompts_without_reward"] == 1
    assert {row["prompt"] for row in rows} == {"a0", "a1", "a2"}
    assert all((row["reward"] is None) == (row["prompt"] == "a1") for row in rows)
    assert [one["prompts"] for one in found["comparisons"]] == [2]  # rows of prompts alone have nothing chosen


def test_the_best_of_n_has_no_length_where_the_reward_failed(trained: Path, place: Path) -> None:
    write_jsonl(Path("asked.jsonl"), [{"prompt": text} for text in ("a0", "a1", "a2")])
    options = ("--dataset", "asked.jsonl", "--best_of", "2", "--completions", "2")
    found, rows = evaluate(trained, *options, reward="tests.commands.conftest.picky")
    rewards, tokens = (by_prompt(rows, "policy", name) for name in ("reward", "tokens"))
    means = []
    for prompt in ("a0", "a2"):
        best = [n for n, reward in zip(tokens[prompt], rewards[prompt], strict=True) if reward == max(rewards[prompt])]
        means.append(statistics.fmean(best))
    assert found["candidates"]["policy, best of 2"]["tokens"]["mean"] == pytest.approx(statistics.fmean(means))


def test_without_a_reward_there_are_kl_and_lengths(trained: Path, place: Path) -> None:
    found, _ = evaluate(trained, reward=None)
    assert found["comparisons"] == []
    assert set(found["candidates"]["policy"]) == {"kl", "tokens", "ended"}


def test_an_adapter_alone_is_evaluated_on_rows_that_are_given(trained: Path, place: Path) -> None:
    shutil.copytree(trained / "adapter", "adapter")
    rows = [{"prompt": "Q001", "chosen": " yes", "rejected": " no"}, {"prompt": "Q002", "completion": "", "label": 1}]
    write_jsonl(Path("asked.jsonl"), rows[:1])
    found, rows = evaluate(Path("adapter"), "--dataset", "asked.jsonl")
    assert found["candidates"]["chosen"]["reward"] == {"mean": 4.0, "standard_error": None}
    assert len(rows) == 2


def test_a_trained_reward_judges_and_is_not_judged(
    base: str, trained: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = fit(base, place, "reward_model")
    found, rows = evaluate(trained, reward=str(judge / "adapter"))
    assert found["settings"]["reward"] == "lit_align.rewards.TrainedReward"
    assert len({row["reward"] for row in rows}) > 4
    assert main(["evaluate", str(judge)]) == 2
    assert "is a trained reward" in capsys.readouterr().err


def test_the_reference_of_a_run_that_began_at_an_adapter_is_that_adapter(base: str, trained: Path, place: Path) -> None:
    """Nothing is learned, so the policy still is the adapter it began at, and far from the base."""
    run = fit(base, place, model__optim__learning_rate=1e-12, model__pair__lora__adapter=trained / "adapter")
    found, _ = evaluate(run)
    assert found["candidates"]["policy"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert evaluate(run / "adapter")[0]["candidates"]["policy"]["kl"] == found["candidates"]["policy"]["kl"]
    shutil.copytree(run / "adapter", "alone")
    alone, _ = evaluate(Path("alone"), "--dataset", "pairs.jsonl")
    assert alone["candidates"]["policy"]["kl"]["mean"] > 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--best_off", "4"], ["--best_off", "did you mean best_of?"]),
        (["--best_of", "129"], ["best_of", "129", "from 2 to 128"]),
        (["--best_of", "4"], ["--reward"]),
        (["--reward", "nowhere.nothing"], ["nowhere.nothing", "lit_align.rewards.Vader"]),
        (["--temperature", "0"], ["temperature", "greater than 0"]),
        (["--max_new_tokens", "500"], ["max_new_tokens", "128"]),
        (["--device", "tpu9000"], ["device", "tpu9000"]),
        (["--dataset", "none.jsonl"], ["none.jsonl"]),
    ],
)
def test_a_mistake_gets_one_line(
    trained: Path, place: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert main(["evaluate", str(trained), "--out", "x.json", *options]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert all(word in message for word in words), message
    assert len(message.splitlines()) == 1
    assert list(place.iterdir()) == []


def test_a_folder_without_a_run_says_what_is_there(
    trained: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained.parent)]) == 2
    assert f"did you mean {trained}?" in capsys.readouterr().err
    assert main(["evaluate", "nowhere"]) == 2
    assert "no such folder" in capsys.readouterr().err
    Path("begun").mkdir()
    shutil.copy(trained / "config.yaml", "begun")
    assert main(["evaluate", "begun"]) == 2
    assert "fit --resume begun" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "RUN is missing" in capsys.readouterr().err


def test_nothing_is_written_over(trained: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("kept.jsonl").write_text("mine")
    assert main(["evaluate", str(trained), "--out", "kept.json"]) == 2
    assert "kept.json" in capsys.readouterr().err
    assert Path("kept.jsonl").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_told_before_anything_is_drawn(
    trained: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "draw_many", None)
    Path("locked").mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # root may write anywhere
    assert main(["evaluate", str(trained), "--out", "locked/in/x.json"]) == 2
    assert "give --out FILE.json, in another folder" in capsys.readouterr().err


def test_an_adapter_beside_somebody_elses_config_is_an_adapter(trained: Path, place: Path) -> None:
    shutil.copytree(trained / "adapter", "project/adapter")
    for text in ("model: gpt2\n", "- a\n", "a: [\n"):
        Path("project/config.yaml").write_text(text)
        assert find_run("project").config == {}


def test_the_adapter_a_run_began_at_may_be_on_the_hub(
    base: str, trained: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the Hub there is what was fetched before."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    cached = place / "hub" / "models--me--start"
    shutil.copytree(trained / "adapter", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    run = fit(base, place, model__optim__learning_rate=1e-12, model__pair__lora__adapter="me/start")
    found, _ = evaluate(run)
    assert found["candidates"]["policy"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    shutil.rmtree(cached)
    assert main(["evaluate", str(run), "--out", "x.json"]) == 2
    assert "the reference of this run is the adapter me/start" in capsys.readouterr().err
