"""``generate``: prompts of the command line, of a file, and typed ones, with and without a chat template."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from lit_align.__main__ import main
from lit_align.commands import generate as command
from tests.commands.conftest import fit
from tests.data.conftest import CHATML, byte_tokenizer, write_jsonl
from tests.families import save_tiny

SHORT = ["--max_new_tokens", "5"]


def written(run: Path, *options: str) -> list[dict[str, Any]]:
    out = Path("out.jsonl")
    assert main(["generate", str(run), *SHORT, "--out", str(out), *options]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    out.unlink()
    return rows


def test_a_prompt_is_answered_by_both_models(trained: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = written(trained, "--prompt", "Q001", "--completions", "2")
    assert [row["model"] for row in rows] == ["policy"] * 2 + ["reference"] * 2
    assert {row["prompt"] for row in rows} == {"Q001"}
    assert all(("kl" in row) == (row["model"] == "policy") for row in rows)
    out = capsys.readouterr().out
    assert "policy" in out
    assert "reference" in out


def test_it_repeats_itself_and_follows_seed_and_sampling(trained: Path, place: Path) -> None:
    once = written(trained, "--prompt", "Q001")
    assert written(trained, "--prompt", "Q001") == once
    assert written(trained, "--prompt", "Q001", "--seed", "1") != once
    greedy = [written(trained, "--prompt", "Q001", "--top_k", "1", "--seed", seed) for seed in ("0", "1")]
    assert greedy[0] == greedy[1]


def test_prompts_of_a_file_are_lines_or_rows(trained: Path, place: Path) -> None:
    Path("asked.txt").write_text("One\n\nTwo\n")
    write_jsonl(Path("asked.jsonl"), [{"prompt": "One", "chosen": " a", "rejected": " b"}, {"prompt": "Two"}][:1])
    assert [row["prompt"] for row in written(trained, "--prompts", "asked.txt")] == ["One", "Two"] * 2
    assert [row["prompt"] for row in written(trained, "--prompts", "asked.jsonl")] == ["One"] * 2


def test_lines_that_are_typed_are_answered(
    trained: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("One\n\nTwo\n/quit\nThree\n"))
    rows = written(trained)
    assert [row["prompt"] for row in rows] == ["One", "One", "Two", "Two"]
    assert rows[0]["completion"] != rows[2]["completion"]


def test_a_conversation_goes_on_with_the_policys_answers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(CHATML)
    save_tiny("llama", place / "base", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(place / "base")
    run = fit(str(place / "base"), place)
    asked: list[list[str]] = []
    own = command.tokenized

    def watch(examples: Any, *rest: Any) -> Any:
        asked.append([message["content"] for message in examples[0].prompt])
        return own(examples, *rest)

    monkeypatch.setattr(command, "tokenized", watch)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nSo\n/new\nBye\n"))
    rows = written(run)
    answers = [row["completion"].strip() for row in rows if row["model"] == "policy"]
    assert asked == [["Hi"], ["Hi", answers[0], "So"], ["Bye"]]
    monkeypatch.setattr(command, "tokenized", own)
    plain = written(run, "--prompt", "Hi", "--plain", "true")
    assert plain[0]["prompt"] == "Hi"
    assert written(run, "--prompt", "Hi")[0]["prompt"] != "Hi"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--promt", "x"], ["did you mean prompt?"]),
        (["--prompt", "x", "--prompts", "y.txt"], ["not both"]),
        (["--prompts", "none.txt"], ["none.txt", "no such file"]),
        (["--prompt", ""], ["no prompt is left"]),
        (["--prompt", "x", "--completions", "0"], ["completions", "1 or more"]),
        (["--prompt", "x", "--top_p", "2"], ["top_p", "(0, 1]"]),
    ],
)
def test_a_mistake_gets_one_line(
    trained: Path, place: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert main(["generate", str(trained), *options]) == 2
    message = capsys.readouterr().err.split("error: ")[1]
    assert all(word in message for word in words), message
    assert len(message.strip().splitlines()) == 1
