"""The tool that builds the embedded default, run on a teacher of random weights whose pieces are sentences."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOOLS = Path(__file__).parents[2] / "tools"
SENTENCES = [
    f"{who} {did}"
    for who in ("Tom", "Lily", "The dog", "A bird")
    for did in ("was happy.", "fell into the cold mud.", "ran home.", "saw a big red ball in the park.", "cried.")
]


@pytest.fixture(scope="module")
def build() -> Any:
    """The modules of the tool."""
    sys.path.insert(0, str(TOOLS))
    from stories_build import data, model, sample, text

    yield {"data": data, "model": model, "sample": sample, "text": text}
    sys.path.remove(str(TOOLS))


def make_teacher(folder: Path) -> None:
    """A Llama of random weights; each piece of its vocabulary is a sentence, and <s> begins a story and ends it."""
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", *SENTENCES])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the tool writes in its quick mode."""
    folder = tmp_path_factory.mktemp("stories")
    make_teacher(folder / "teacher")
    command = [sys.executable, TOOLS / "build_stories.py", "--quick", "--device", "cpu"]
    command += ["--teacher", folder / "teacher", "--work", folder / "work", "--out", folder / "out"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    again = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    assert again.stdout.count("done before") == 6
    return folder / "out"


def test_package_has_rows_of_its_own_policy(package: Path) -> None:
    about = json.loads((package / "about.json").read_text())
    assert about["oracle"] == "lit_align.rewards.Vader"
    for name, wanted in (("train", 8), ("validation", 2)):
        rows = [json.loads(line) for line in (package / f"{name}.jsonl").read_text().splitlines()]
        assert 0 < len(rows) <= wanted
        for row in rows:
            assert len(set(row["completions"])) == len(row["rewards"]) == 2
            assert all(completion.startswith(" ") for completion in row["completions"])


def test_validation_prompts_are_nowhere_in_the_training_text(package: Path, build: Any) -> None:
    prompts = [json.loads(line)["prompt"] for line in (package / "validation.jsonl").read_text().splitlines()]
    rows = [json.loads(line)["prompt"] for line in (package / "train.jsonl").read_text().splitlines()]
    assert not set(prompts) & set(rows)
    stories = [
        " ".join(json.loads(line)["sentences"])
        for path in (package.parent / "work" / "stories").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    beginning = [story for story in stories if story.startswith(tuple(prompts))]
    assert beginning, "the teacher told the story of each validation prompt"
    for line in beginning:
        opening = build["text"].scene(build["text"].clean(line, True))
        assert build["text"].held_out(opening)


def test_model_and_tokenizer_load(package: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(package)
    tokenizer = AutoTokenizer.from_pretrained(package)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 1
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_sentences_end_neither_in_quotations_nor_before_lower_case(build: Any) -> None:
    sentences = build["text"].sentences
    assert sentences('Tom ran. "Stop! Go home!" said Mom. He did') == ["Tom ran.", '"Stop! Go home!" said Mom.']
    assert sentences("Hello! Who is there? Me.") == ["Hello!", "Who is there?", "Me."]


@pytest.mark.parametrize(
    "text", ["Tom ran. He fell.", "Tom ran. He fell on $5. He cried.", "tom ran. He fell. He cried."]
)
def test_short_or_garbled_stories_are_dropped(build: Any, text: str) -> None:
    assert build["text"].clean(text, True) is None


def test_cut_stories_lose_their_tail_and_are_not_called_ended(build: Any) -> None:
    story = build["text"].clean("Tom ran\nhome. He  was \u201csad\u201d. He cried. Then the", False)
    assert story.text == 'Tom ran home. He was "sad". He cried.'
    assert not story.ended
    assert build["text"].clean("Tom ran home. He was sad. He cried.", True).ended


def test_a_scene_depends_on_the_beginning_alone(build: Any) -> None:
    text = build["text"]
    story = text.Story(
        tuple(f"Tom saw {count} big red dogs today." for count in ("one", "two", "three", "four", "five")), True
    )
    opening = text.scene(story)
    assert opening is not None
    for other in ("He cried.", "It was late and the sun was low."):
        count = text.scene_length(story)
        assert text.scene(text.Story((*story.sentences[:count], other), True)) == opening


def test_rows_are_split_at_the_separator(build: Any) -> None:
    assert build["sample"].split([1, 5, 6, 1, 7], 1) == [([5, 6], True), ([7], False)]


def test_draws_follow_the_models_distribution(build: Any, tmp_path: Path) -> None:
    make_teacher(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    first = torch.tensor([[1, 4, 9]]).repeat(4000, 1)
    with torch.inference_mode():
        expected = model(first[:1]).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    drawn = build["sample"].Sampler(model).draw(first, [1.0])[:, 3]
    seen = torch.bincount(drawn, minlength=len(expected)) / 4000
    assert (seen - expected).abs().max() < 5 * (expected.max() / 4000).sqrt()


def test_cached_draws_see_the_whole_row(build: Any, tmp_path: Path) -> None:
    make_teacher(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    row = build["sample"].Sampler(model).draw(torch.tensor([[1]]), [1e-6] * 9)  # at this temperature the likeliest
    with torch.inference_mode():
        assert model(row).logits[0, :-1].argmax(-1).tolist() == row[0, 1:].tolist()


def test_loss_is_on_the_continuation_and_its_end(build: Any, package: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(package)
    pairs = [("Tom ran home.", " He cried."), ("Lily cried.", " Tom was happy.")] * 9
    ids, labels = build["data"].fine_tuning_rows(pairs, tokenizer, 40, 64)
    assert ids.shape == labels.shape
    wanted = labels != build["model"].IGNORED
    assert torch.equal(ids[wanted], labels[wanted])
    text = tokenizer.decode(ids[wanted])
    assert text.startswith(" He cried.<|eos|> Tom was happy.<|eos|> He cried.")
    assert tokenizer.decode(ids[~wanted]).startswith("<|bos|>Tom ran home.<|bos|>Lily cried.<|bos|>")


def test_continuations_follow_their_scene_and_cheerful_ones_are_thinned(build: Any) -> None:
    stories = [
        build["text"].Story(
            (
                f"Tom saw {count} red dogs and one blue bird and he ran all the way home to tell mother of the birds.",
                "A.",
                "B!",
                "C.",
            ),
            True,
        )
        for count in range(200)
    ]
    found = build["data"].continuations(stories, lambda text: float("B" in text), 0.25, 0)
    assert {completion for _, completion in found} == {" A.", " A. B!", " A. B! C."}
    shares = [sum(completion == text for _, completion in found) / 200 for text in (" A.", " A. B!")]
    # Two of three lengths are drawn for a story; a share s of 200 has a standard deviation below 0.036.
    assert shares[0] == pytest.approx(2 / 3, abs=0.15)
    assert shares[1] == pytest.approx(2 / 3 * 0.25, abs=0.15)


def test_rate_warms_up_and_then_falls_linearly(build: Any) -> None:
    recipe = build["model"].Recipe(10, 1, (4.0, 2.0), 1.0, 0, "cpu")
    assert recipe.rate(0.0) == pytest.approx(0.08)
    assert recipe.rate(0.5) == pytest.approx(3.0)
    assert recipe.rate(1.0) == pytest.approx(2.0)
