"""What the runs of controlled sentiment read: completions of the reference with their rewards, and a reward model.

Everything is drawn at the temperature of the YAML, which training and KL share. Files that are there are not made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from trials.after import command
from trials.trial import TRAINED, Trial, start_of
from trials.workers import in_child

from lit_align.batch import CompletionBatch
from lit_align.settings import LoraSettings, PairSettings

MOST = 8
"""Completions of a training prompt: the larger K."""
SEED = 77
"""Of what all runs share."""


@dataclass(frozen=True)
class Own:
    """What the study's YAML says.

    Attributes:
        config: The YAML.
        pair: The model, as ``PairSettings`` has it.
        dataset: Rows with prompts.
        reward: The oracle: a dotted name, or the folder of a trained reward.
        rows: Prompts to train on.
        length: Tokens of a prompt and a completion.
        tokens: Budget of a completion.
        prompts: Held-out prompts.
        steps: Optimizer steps.
        every: Steps between two checkpoints, at which samples are drawn.
        answers: Completions of each held-out prompt that stand for the reference.
    """

    config: Path
    pair: dict[str, Any]
    dataset: str
    reward: str
    rows: int
    length: int
    tokens: int
    prompts: int
    steps: int
    every: int
    answers: int = 32

    @classmethod
    def read(cls, config: Path) -> Own:
        """From the YAML."""
        text = yaml.safe_load(config.read_text(encoding="utf-8"))
        data, samples = text["data"]["init_args"], text["samples"]
        reward = data["reward"]
        name = reward if isinstance(reward, str) else reward["init_args"]["path"]
        sizes = data["max_rows"], data["max_length"], samples["max_new_tokens"], samples["prompts"]
        pair = text["model"]["init_args"]["pair"]
        return cls(config, pair, data["dataset"], name, *sizes, text["trainer"]["max_steps"], samples["every_n_steps"])

    @property
    def world(self) -> str:
        """Name of the folder of what all runs read, another for other settings."""
        text = json.dumps([asdict(self) | {"config": self.config.read_text(encoding="utf-8")}])
        return f"world-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def settings(self) -> PairSettings:
        """The model."""
        lora = LoraSettings(**self.pair.get("lora", {}))
        return PairSettings(**{**self.pair, "lora": lora})


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """A file, made in a process of its own under another name, and then moved, so that it is whole or not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"part-{os.getpid()}-{path.name}")
        in_child(partial(make, part))
        part.replace(path)
    return path


def groups(world: Path, own: Own) -> Path:
    """Rows of ``MOST`` completions the reference draws of each training prompt, with the oracle's rewards."""
    settings = own.settings
    given = {"model": settings.model, "completions": MOST, "temperature": settings.temperature, "seed": SEED}
    given |= {"max_rows": own.rows, "max_new_tokens": own.tokens, "max_length": own.length, "reward": own.reward}
    given |= {"dataset": own.dataset} | ({"adapter": settings.lora.adapter} if settings.lora.adapter else {})
    return made(world / "groups.jsonl", partial(scored_by, given))


def proxy(world: Path, own: Own) -> Path:
    """The same rows with the rewards of ``reward_model``."""
    given = {"dataset": groups(world, own), "reward": reward_model(world, own)}
    return made(world / "proxy.jsonl", partial(scored_by, given))


def scored_by(given: dict[str, object], out: Path) -> None:
    """Run ``tools/score.py``."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from score import main

    command([f"--{key}={value}" for key, value in {**given, "out": out}.items()], out.with_suffix(".log"), main)


def reward_model(world: Path, own: Own) -> Path:
    """A reward trained on the oracle's preferences among the first 4 of these completions: its folder."""
    folder = world / "reward_model"
    options = {"model": "RewardModel", "data.dataset": groups(world, own), "data.validation_dataset": own.dataset}
    options |= {"data.select": "all_pairs", "data.max_completions": 4, "data.batch_size": 16, "samples.prompts": 0}
    options |= {"trainer.max_steps": 2 * own.steps, "trainer.limit_val_batches": max(1, own.rows // 16)}
    if not (folder / TRAINED).exists():
        run = partial(command, start_of(Trial("reward model", own.config, options, SEED), folder))
        in_child(partial(run, world / "reward_model.log"))
        (folder / TRAINED).touch()
    return folder / "adapter"


def reference(world: Path, own: Own) -> Path:
    """Answers of the reference to held-out prompts, as ids, with the oracle's rewards."""
    return made(world / f"reference-{own.answers}.pt", partial(draw_reference, own))


def draw_reference(own: Own, out: Path) -> None:
    """Draw them: what ``read_reference`` reads."""
    from lit_align.commands.arguments import Drawing
    from lit_align.commands.drawing import draw_many
    from lit_align.commands.prompts import read_distinct, tokenized
    from lit_align.commands.rewarding import load_reward
    from lit_align.commands.runs import Loaded, device_of
    from lit_align.data.text import Limits
    from lit_align.models import load_tokenizer
    from lit_align.pair import PolicyReferencePair

    device, tokenizer = device_of("auto"), load_tokenizer(own.settings)
    pair = PolicyReferencePair(own.settings, device, tokenizer.eos_token_id).requires_grad_(False).eval()
    examples = read_distinct(own.dataset, "validation")[: own.prompts]
    asked = tokenized(examples, tokenizer, Limits(own.length, own.length - own.tokens))
    drawing, reward = Drawing(own.tokens, seed=SEED), load_reward(own.reward)
    loaded = Loaded(pair, tokenizer, device)
    drawn = draw_many(loaded, asked, own.answers, drawing, reference=True, reward=reward)
    assert drawn.reward is not None
    ids = {name: field for name, field in drawn.groups._asdict().items() if field is not None}
    torch.save({"groups": ids, "reward": drawn.reward}, out)


def read_reference(path: Path) -> tuple[CompletionBatch, torch.Tensor]:
    """The answers, and their rewards float64 (N, M)."""
    found = torch.load(path, weights_only=True)
    return CompletionBatch(**{"reward": None, **found["groups"]}).to("cpu"), found["reward"]
