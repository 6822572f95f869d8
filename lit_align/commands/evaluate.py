"""How good a policy is: reward, KL to the reference, win rates against the reference and the dataset's chosen.

Prompts are those of the run's validation, or of --dataset. Both models draw independently; every standard error is
taken over prompts. docs/evaluation.md says how each figure is computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lit_align.assets import resolve
from lit_align.batch import CompletionBatch
from lit_align.commands.arguments import CommandParser, Drawing, Loading, parse
from lit_align.commands.drawing import draw_many
from lit_align.commands.prompts import read_distinct, tokenized
from lit_align.commands.rewarding import load_reward
from lit_align.commands.runs import Loaded, Opened, find_run, load, opened
from lit_align.commands.standings import Standings
from lit_align.data import UnpairedData
from lit_align.data.completions import CompletionData
from lit_align.data.judge import RewardFunction, judge
from lit_align.data.oracle import load_oracle
from lit_align.data.text import Limits
from lit_align.errors import UserError
from lit_align.settings import check

MOST = 128
"""Largest N of best of N."""
REFERENCE_SEED = 500_000_009
"""Added to the seed for the reference, so that it draws independently of the policy."""


@dataclass(frozen=True)
class Evaluate:
    """What is evaluated, and how.

    Attributes:
        run: Run folder, or the folder of an adapter.
        reward: Folder of a trained reward, or dotted name of a Python callable (prompts, completions) -> floats; None
            is the oracle of the dataset, where it has one.
        prompts: Prompts to evaluate on, the first distinct ones, >= 1.
        completions: Completions of each prompt by each model, >= 1.
        best_of: Also keep the best of N samples by the reward, N from 2 to 128; None does not.
        dataset: Rows with prompts, in any format, in the place of the run's validation rows: a file, a folder or a Hub
            name.
        split: Split of ``dataset``, where it has splits.
        columns: Names of columns of ``dataset``: our names to its own.
        out: JSON file to write; None is evaluation.json in the folder, numbered if there is one. The completions stand
            beside it in a .jsonl.
    """

    run: str
    reward: str | None = None
    prompts: int = 64
    completions: int = 1
    best_of: int | None = None
    dataset: str | None = None
    split: str = "validation"
    columns: dict[str, str] | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        check("prompts", self.prompts, self.prompts >= 1, "1 or more", "64")
        check("completions", self.completions, self.completions >= 1, "1 or more", "1")
        n = 2 if self.best_of is None else self.best_of
        check("best_of", n, 2 <= n <= MOST, f"from 2 to {MOST}", "16")


def run(args: Sequence[str]) -> None:
    """Evaluate, write the figures and print them."""
    options, drawing, loading = parse("evaluate", args, __doc__, Evaluate, Drawing, Loading)
    out = _free_place(options.out, options.run)
    found = find_run(options.run)
    ready = opened(found, loading)
    prompts, oracle = questions(options, ready, drawing.max_new_tokens)
    reward = oracle if options.reward is None else load_reward(options.reward)
    if reward is None and options.best_of is not None:
        raise UserError(
            f"best_of={options.best_of} keeps the completion of the highest reward, and these prompts come with none: "
            "give --reward, the folder of a trained reward or the name of a Python callable"
        )
    loaded = load(ready)
    count = max(options.completions, options.best_of or 0)
    drawn = [
        draw_many(loaded, prompts, count, independent(drawing), reference=True, reward=reward),
        draw_many(loaded, prompts, count, drawing, reference=False, reward=reward),
    ]
    standings = Standings(drawn, with_rewards(prompts, reward, loaded), options.completions, options.best_of)
    settings = {**asdict(options), **asdict(drawing), "model": ready.settings.model}
    settings |= {"reward": _name(reward), "prompts": len(prompts.row), "objective": found.objective}
    standings.show()
    _write(out, {"settings": settings, **standings.as_dict()}, standings)
    print(f"written to {out}, the completions to {out.with_suffix('.jsonl')}")


def _write(out: Path, figures: dict[str, Any], standings: Standings) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with out.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in standings.rows())
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}; what is above is all of it") from error


def _name(reward: RewardFunction | None) -> str | None:
    if reward is None:
        return None
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}.{named.__qualname__}"


def independent(drawing: Drawing) -> Drawing:
    """The same with other seeds."""
    return Drawing(**{**asdict(drawing), "seed": drawing.seed + REFERENCE_SEED})


def _free_place(out: str | None, folder: str) -> Path:
    """Where to write, the completions beside it as .jsonl; nothing is written over."""
    names = (f"evaluation{'' if i == 1 else f'-{i}'}.json" for i in range(1, 10_000))
    place = next(filter(_is_free, (Path(folder) / name for name in names))) if out is None else Path(out)
    if not (place.suffix == ".json" and _is_free(place)):
        raise UserError(f"out={out}: give the name of a .json file that does not exist yet, nor its .jsonl beside it")
    there = next(parent for parent in place.absolute().parents if parent.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"{there} cannot be written to: give --out FILE.json, in another folder")
    return place


def _is_free(place: Path) -> bool:
    return not (place.exists() or place.with_suffix(".jsonl").exists())


def questions(options: Evaluate, ready: Opened, new_tokens: int) -> tuple[CompletionBatch, RewardFunction | None]:
    """The prompts, with the chosen completion of each where there is one, and the reward that comes with them."""
    room = ready.context - new_tokens
    check("max_new_tokens", new_tokens, room >= 1, f"below the {ready.context} tokens the model reads", "64")
    if options.dataset is not None:
        examples = read_distinct(options.dataset, options.split, options.columns)[: options.prompts]
        packaged = resolve(options.dataset)
        oracle = load_oracle(Path(packaged)) if packaged != options.dataset else None
        return tokenized(examples, ready.tokenizer, Limits(ready.context, room)), oracle
    if not ready.run.config.get("data"):
        raise UserError(f"{options.run} is an adapter without a run, so there are no validation rows: give --dataset")
    data = data_of(ready.run.config)
    data.load(ready.tokenizer)
    batch: CompletionBatch = data.prompts(options.prompts)
    if isinstance(data, UnpairedData):
        assert batch.reward is not None
        batch = batch._replace(present=batch.present & (batch.reward > 0))
    return batch, data.oracle


def data_of(config: Mapping[str, Any]) -> Any:
    """The data module that a run's configuration names.

    Raises:
        UserError: If it cannot be built as it stands there.
    """
    parser = CommandParser(prog="config.yaml")
    parser.add_subclass_arguments(CompletionData, "data")
    return parser.instantiate(parser.parse_object({"data": config["data"]})).data


def with_rewards(prompts: CompletionBatch, reward: RewardFunction | None, loaded: Loaded) -> CompletionBatch:
    """The prompts with their chosen completions alone, and the rewards of these, NaN where it failed."""
    chosen = prompts._replace(
        completion_ids=prompts.completion_ids[:, :1],
        completion_mask=prompts.completion_mask[:, :1],
        reward=None,
        present=prompts.present[:, :1] & prompts.completion_mask[:, :1].any(-1),
    )
    there = chosen.present[:, 0]
    rewards = torch.full(chosen.present.shape, torch.nan)
    if reward is not None and there.any():
        rewards[there] = judge(reward, chosen.rows(there), loaded.tokenizer)
    return chosen._replace(reward=rewards)
