"""Makes the model and the data that ship with lit_align, from stories a teacher tells.

    python tools/build_stories.py --teacher DIRECTORY --work DIRECTORY --out lit_align/assets/stories

Stages, each kept in --work and not repeated: sample, tokenizer, pretrain, finetune, draw, package. Name some to run
only these; pass --again to repeat what is done. Stages after a repeated one are not repeated by themselves.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stories_build.arguments import parse
from stories_build.data import Draws, Row, continuations, draw_rows, fine_tuning_rows
from stories_build.model import Recipe, Shape, pack, random_model, train
from stories_build.package import write_package
from stories_build.sample import SampleSettings, sample
from stories_build.text import Story, by_scene, held_out, scene
from stories_build.vocabulary import train_tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

ROW_TOKENS = 128


class Build:
    """The state the stages share: arguments, and what earlier stages left in the work folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work
        self.work.mkdir(parents=True, exist_ok=True)

    def figures(self, stage: str, **values: Any) -> None:
        """Keep the figures of a stage; their file marks it done."""
        (self.work / f"{stage}.json").write_text(json.dumps(values, indent=2) + "\n")
        print(f"{stage}: {json.dumps(values)}", flush=True)

    def read(self, stage: str) -> Any:
        """The figures of a finished stage."""
        return json.loads((self.work / f"{stage}.json").read_text())

    def stories(self) -> dict[str, list[Story]]:
        """The sampled stories: those to train on, shuffled, and those of held-out scenes."""
        parts: dict[str, list[Story]] = {"train": [], "validation": []}
        for path in sorted((self.work / "stories").glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                fields = json.loads(line)
                story = Story(tuple(fields["sentences"]), fields["ended"])
                parts["validation" if held_out(scene(story) or "") else "train"].append(story)
        random.Random(self.arguments.seed).shuffle(parts["train"])
        return parts

    def train(self, stage: str, model: LlamaForCausalLM, rows: dict[str, Any], rates: tuple[float, float]) -> Any:
        """Train a model on the rows of a stage, show it at work on the way, save it, and return the figures."""
        given, tokenizer = self.arguments, self.tokenizer
        scenes = list(by_scene(self.stories()["validation"]))[:4]

        def watch() -> None:
            model.save_pretrained(self.work / stage)
            drawn = draw_rows(model, tokenizer, scenes, judge(), 1, given.budget, given.seed)
            print(*(f"    {row.prompt} ->{row.completions[0]}" for row in drawn.rows), sep="\n", flush=True)

        steps, seconds = getattr(given, f"{stage}_steps"), getattr(given, f"{stage}_seconds")
        recipe = Recipe(steps, given.train_rows, rates, seconds, given.seed, given.device)
        figures = train(model, rows["train"], rows["validation"], recipe, watch)
        watch()
        return figures

    def load(self, stage: str) -> LlamaForCausalLM:
        """The model a training stage saved."""
        return LlamaForCausalLM.from_pretrained(self.work / stage, dtype=torch.float32).to(self.arguments.device)

    def policy(self) -> LlamaForCausalLM:
        """The fine-tuned model as it ships: sharpened, its weights rounded to bfloat16.

        The last norm's gain scales the logits: drawing from the result at temperature 1 is drawing from the fine-tuned
        model at temperature 1 / gain, which spares a small model's readers the tail of its distribution.
        """
        model = self.load("finetune")
        model.model.norm.weight.data.mul_(self.arguments.sharpen)
        return model.to(torch.bfloat16).float().eval()

    @property
    def tokenizer(self) -> Any:
        """Our tokenizer."""
        return AutoTokenizer.from_pretrained(self.work / "tokenizer")


def judge() -> Callable[[str], float]:
    """VADER's compound score of a text, in [-1, 1]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def stage_sample(build: Build) -> None:
    given = build.arguments
    settings = SampleSettings(
        teacher=given.teacher,
        batches=given.batches,
        rows=given.rows,
        tokens=given.row_tokens,
        temperature=given.temperature,
        varied=given.varied,
        pieces=given.pieces,
        seed=given.seed + 1000,
        device=given.device,
        workers=given.workers,
        threads=max(1, given.threads // given.workers),
    )
    sample(settings, build.work)
    parts = build.stories()
    stories = parts["train"] + parts["validation"]
    words = sum(len(story.text.split()) for story in stories)
    tokens = given.batches * given.rows * given.row_tokens
    scenes = len(by_scene(stories))
    build.figures("sample", teacher_tokens=tokens, stories=len(stories), scenes=scenes, words=words)


def stage_tokenizer(build: Build) -> None:
    texts = [story.text for story in build.stories()["train"]]
    train_tokenizer(texts, build.arguments.vocabulary, build.work / "tokenizer", build.arguments.context)
    tokenizer = build.tokenizer
    some = texts[:1000]
    tokens = sum(len(ids) for ids in tokenizer(some, add_special_tokens=False).input_ids)
    words = sum(len(text.split()) for text in some)
    build.figures("tokenizer", vocabulary=len(tokenizer), tokens_per_word=round(tokens / words, 3))


def stage_pretrain(build: Build) -> None:
    given, tokenizer, rows = build.arguments, build.tokenizer, {}
    for name, stories in build.stories().items():
        documents = [tokenizer(story.text).input_ids + [tokenizer.eos_token_id] * story.ended for story in stories]
        ids = pack(documents, ROW_TOKENS)
        rows[name] = (ids, ids) if name == "train" else (ids[:200], ids[:200])
    torch.manual_seed(given.seed)
    shape = Shape(given.hidden, given.layers, given.heads, given.intermediate, given.context)
    model = random_model(tokenizer, shape)
    figures = build.train("pretrain", model, rows, (given.learning_rate, 0.3 * given.learning_rate))
    build.figures("pretrain", parameters=model.num_parameters(), corpus_tokens=rows["train"][0].numel(), **figures)


def stage_finetune(build: Build) -> None:
    given, tokenizer, rows = build.arguments, build.tokenizer, {}
    for name, stories in build.stories().items():
        pairs = continuations(stories, judge(), given.positive_share, given.seed)
        ids, labels = fine_tuning_rows(pairs, tokenizer, ROW_TOKENS, given.budget)
        rows[name] = (ids, labels) if name == "train" else (ids[:200], labels[:200])
        print(f"{len(pairs)} continuations for {name}", flush=True)
    model = build.load("pretrain")
    figures = build.train("finetune", model, rows, (0.3 * given.learning_rate, 0.0))
    build.figures("finetune", corpus_tokens=rows["train"][0].numel(), **figures)


def stage_draw(build: Build) -> None:
    given, tokenizer, model = build.arguments, build.tokenizer, build.policy()
    figures: dict[str, Any] = {}
    for name, stories in build.stories().items():
        wanted = given.train_prompts if name == "train" else given.validation_prompts
        scenes = list(by_scene(stories))[: int(wanted * given.candidates)]
        drawn = draw_rows(model, tokenizer, scenes, judge(), given.completions, given.budget, given.seed)
        kept = [row for row in drawn.rows if row.spread >= given.spread]
        lines = [json.dumps(row._asdict()) + "\n" for row in kept[:wanted]]
        (build.work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        figures[name] = _draw_figures(drawn, kept, wanted, len(scenes), given.completions)
    build.figures("draw", completions=given.completions, least_spread=given.spread, **figures)


def _draw_figures(drawn: Draws, kept: list[Row], wanted: int, scenes: int, completions: int) -> dict[str, Any]:
    rewards = [reward for row in kept[:wanted] for reward in row.rewards]
    return {
        "prompts": len(kept[:wanted]),
        "prompts_drawn": scenes,
        "prompts_with_enough_completions": len(drawn.rows),
        "share_with_spread": round(len(kept) / max(len(drawn.rows), 1), 4),
        "share_ended": round(drawn.ended / max(drawn.drawn, 1), 4),
        "share_of_ended_usable": round(drawn.retokenized / max(drawn.ended, 1), 4),
        "mean_tokens": round(drawn.tokens / max(len(drawn.rows) * completions, 1), 2),
        "mean_reward_of_all_draws": round(drawn.mean, 4),
        "mean_reward": round(sum(rewards) / max(len(rewards), 1), 4),
        "mean_spread": round(sum(row.spread for row in kept[:wanted]) / max(len(kept[:wanted]), 1), 4),
    }


def stage_package(build: Build) -> None:
    given = build.arguments
    rows = {}
    for name in ("train", "validation"):
        lines = (build.work / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = [Row(**json.loads(line)) for line in lines]
    unsaid = ("stages", "teacher", "teacher_name", "work", "out", "again")
    about = {
        "oracle": "lit_align.rewards.Vader",
        "licence": "Apache-2.0",
        "teacher": given.teacher_name or Path(given.teacher).name,
        "built_on": f"{given.device} ({platform.machine()}), torch {torch.__version__}",
        "settings": {name: value for name, value in vars(given).items() if name not in unsaid},
        **{stage: build.read(stage) for stage in ("sample", "tokenizer", "pretrain", "finetune")},
        "data": {**build.read("draw"), "temperature": 1.0, "max_new_tokens": given.budget},
    }
    write_package(given.out, build.policy(), build.tokenizer, rows, about, given.budget)
    build.figures("package", bytes=sum(path.stat().st_size for path in given.out.iterdir()))


STAGES: dict[str, Callable[[Build], None]] = {
    "sample": stage_sample,
    "tokenizer": stage_tokenizer,
    "pretrain": stage_pretrain,
    "finetune": stage_finetune,
    "draw": stage_draw,
    "package": stage_package,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that are named and not done yet."""
    given = parse(arguments, __doc__ or "", list(STAGES))
    torch.set_num_threads(given.threads)
    build = Build(given)
    for name, stage in STAGES.items():
        if given.stages and name not in given.stages:
            continue
        if (build.work / f"{name}.json").exists() and not given.again:
            print(f"{name}: done before", flush=True)
        else:
            stage(build)
    return 0


if __name__ == "__main__":
    sys.exit(main())
