"""How good a policy is: reward, KL to the reference, win rates against the reference and the dataset's chosen.

Prompts are those of the run's validation, or of --dataset. Both models draw independently; every standard error is
taken over prompts. docs/evaluation.md says how each figure is computed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_align.assets import resolve
from lit_align.batch import Reward
from lit_align.commands.arguments import Drawing, Loading, parse
from lit_align.commands.drawing import draw_many
from lit_align.commands.judging import load_reward
from lit_align.commands.prompts import Asked, asked_of, prompt_texts, read_distinct
from lit_align.commands.runs import Loaded, Run, find_run, load, with_base
from lit_align.commands.standings import Standings
from lit_align.data import UnpairedData
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
    reward, judge = _reward(options, found)
    loaded = load(found, loading)
    asked = _asked(options, found, loaded, drawing.max_new_tokens)
    draws = max(options.completions, options.best_of or 0)
    drawn = [
        draw_many(loaded, asked.batch, draws, independent(drawing), True, "reference"),
        draw_many(loaded, asked.batch, draws, drawing, False, "policy"),
    ]
    standings = Standings(drawn, asked, loaded.tokenizer, reward, options.completions, options.best_of)
    settings = {**asdict(options), **asdict(drawing), "model": with_base(found.settings, loading).model}
    settings |= {"reward": judge, "prompts": len(asked.texts), "objective": found.objective}
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": settings, **standings.as_dict()}, indent=2, ensure_ascii=False)
    out.write_text(text + "\n", encoding="utf-8")
    rows = out.with_suffix(".jsonl")
    with rows.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in standings.rows())
    standings.show()
    print(f"written to {out}, the completions to {rows}")


def independent(drawing: Drawing) -> Drawing:
    """The same with other seeds."""
    return Drawing(**{**asdict(drawing), "seed": drawing.seed + REFERENCE_SEED})


def _free_place(out: str | None, folder: str) -> Path:
    """Where to write; nothing is written over."""
    if out is not None:
        if Path(out).exists() or not out.endswith(".json"):
            raise UserError(f"out={out}: give the name of a .json file that does not exist yet")
        return Path(out)
    names = (f"evaluation{'' if i == 1 else f'-{i}'}.json" for i in range(1, 10_000))
    return next(Path(folder) / name for name in names if not (Path(folder) / name).exists())


def _reward(options: Evaluate, found: Run) -> tuple[Reward | None, str | None]:
    """The reward, and its name."""
    if options.reward is not None:
        return load_reward(options.reward), options.reward
    dataset = options.dataset or _data_arguments(found).get("dataset", "")
    packaged = resolve(dataset)
    if packaged != dataset:
        oracle = load_oracle(Path(packaged))
        return oracle, f"{type(oracle).__module__}.{type(oracle).__name__}"
    if options.best_of is not None:
        raise UserError(
            f"best_of={options.best_of} keeps the completion of the highest reward, and {dataset or 'the adapter'} "
            "comes with none: give --reward, the folder of a trained reward or the name of a Python callable"
        )
    return None, None


def _data_arguments(found: Run) -> dict[str, Any]:
    return dict((found.config.get("data") or {}).get("init_args") or {})


def _asked(options: Evaluate, found: Run, loaded: Loaded, new_tokens: int) -> Asked:
    """The prompts, with the chosen completion of each where there is one."""
    if options.dataset is not None:
        examples = read_distinct(options.dataset, options.split, options.columns)[: options.prompts]
        room = loaded.context - new_tokens
        check("max_new_tokens", new_tokens, room >= 1, f"below the {loaded.context} tokens the model reads", "64")
        asked = asked_of(examples, loaded.tokenizer, Limits(loaded.context, room))
        if not asked.texts:
            raise UserError(f"{options.dataset}: no prompt is left")
        return asked
    if "data" not in found.config:
        raise UserError(f"{options.run} is an adapter without a run, so there are no validation rows: give --dataset")
    module, _, name = found.config["data"]["class_path"].rpartition(".")
    data = getattr(importlib.import_module(module), name)(**_data_arguments(found))
    data.load(loaded.tokenizer)
    batch = data.prompts(options.prompts)
    chosen = batch.present[:, :1] & batch.completion_mask[:, :1].any(-1)
    if isinstance(data, UnpairedData):
        assert batch.reward is not None
        chosen = chosen & (batch.reward[:, :1] > 0)
    kept = batch._replace(
        completion_ids=batch.completion_ids[:, :1],
        completion_mask=batch.completion_mask[:, :1],
        reward=None,
        present=chosen,
    )
    return Asked(kept, prompt_texts(batch, loaded.tokenizer))
