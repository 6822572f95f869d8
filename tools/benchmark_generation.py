"""Sampled tokens a second, ours beside transformers' own ``generate``, on one model with its adapter.

    python tools/benchmark_generation.py --out generation.json

Both draw completions of the same prompts in the same way, one after the other, and count the tokens that are kept: up
to the end of sequence, and with it. The second half of the table has no end of sequence, so that every completion
fills the budget: there, rows that end give no gain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_align.assets import resolve
from lit_align.batch import CompletionBatch, Sampling
from lit_align.data.collate import Group, collate
from lit_align.data.sources import read_rows
from lit_align.errors import UserError
from lit_align.models import load_tokenizer
from lit_align.pair import PolicyReferencePair
from lit_align.settings import PairSettings


class Timing(NamedTuple):
    """One run of one way to generate."""

    tokens: int
    seconds: float
    cpu_seconds: float


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="stories", help="stories, a folder or a Hub name")
    add("--dataset", default="stories", help="where the prompts come from, as for training")
    add("--prompts", type=int, default=8, help="prompts")
    add("--completions", type=int, default=8, help="completions of each")
    add("--tokens", type=int, default=64, help="token budget of a completion")
    add("--temperature", type=float, default=1.0, help="divides the logits")
    add("--top_k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    add("--top_p", type=float, default=1.0, help="keep the likeliest tokens of this mass")
    add("--repeats", type=int, default=7, help="runs of each way that count, after one that does not")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--out", type=Path, help="a .json file to write")
    given = parser.parse_args(arguments)
    for name in ("prompts", "completions", "tokens", "repeats", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    return given


def trained_pair(model: str) -> tuple[PolicyReferencePair, Any]:
    """A pair whose adapter does something, as after some training, and its tokenizer."""
    settings = PairSettings(model)
    tokenizer = load_tokenizer(settings)
    pair = PolicyReferencePair(settings, "cuda" if torch.cuda.is_available() else "cpu", tokenizer.eos_token_id)
    generator = torch.Generator().manual_seed(0)
    for parameter in pair.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return pair, tokenizer


def read_prompts(given: argparse.Namespace, tokenizer: Any) -> CompletionBatch:
    rows = read_rows(resolve(given.dataset), "train", None).rows
    texts = list(dict.fromkeys(text for row in rows if isinstance(text := row.fields.get("prompt"), str)))
    if len(texts) < given.prompts:
        raise UserError(f"--prompts is {given.prompts}, and {given.dataset} has {len(texts)} distinct prompts of text")
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts[: given.prompts]]
    return collate([Group(row, prompt, [], None) for row, prompt in enumerate(ids)])


def ours(pair: PolicyReferencePair, prompts: CompletionBatch, given: argparse.Namespace) -> Callable[[int], int]:
    sampling = Sampling(given.tokens, given.temperature, given.top_k, given.top_p)

    def run(seed: int) -> int:
        drawn = pair.generate(prompts, given.completions, sampling._replace(seed=seed))
        return int(drawn.completions.completion_mask.sum())

    return run


def theirs(pair: PolicyReferencePair, prompts: CompletionBatch, given: argparse.Namespace) -> Callable[[int], int]:
    """transformers' own: every completion is a row from the start, and stays one until the last has ended."""
    from transformers import GenerationConfig

    order = prompts.prompt_mask.int().argsort(dim=1, stable=True)

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        pair.policy.eval()
        output = pair.policy.generate(
            input_ids=prompts.prompt_ids.gather(1, order),
            attention_mask=prompts.prompt_mask.gather(1, order).long(),
            generation_config=GenerationConfig(
                do_sample=True,
                num_return_sequences=given.completions,
                max_new_tokens=given.tokens,
                temperature=given.temperature,
                top_k=given.top_k,
                top_p=given.top_p,
                eos_token_id=pair.stop_ids or None,
                pad_token_id=0,
            ),
        )
        return kept(output[:, order.shape[1] :], pair.stop_ids)

    return run


def kept(ids: Tensor, stop_ids: list[int]) -> int:
    """Tokens up to the first end of sequence, and with it."""
    ended = torch.isin(ids, torch.tensor(stop_ids, dtype=ids.dtype, device=ids.device)).long()
    return int((ended.cumsum(-1) - ended == 0).sum())


def measure(ways: dict[str, Callable[[int], int]], repeats: int) -> dict[str, list[Timing]]:
    """Run the ways in turn, so that a busy moment of the machine meets all of them; the first turn does not count."""
    found: dict[str, list[Timing]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = way(turn)
            timing = Timing(tokens, time.perf_counter() - wall, time.process_time() - cpu)
            found[name] += [timing] if turn else []
    return found


def summary(found: dict[str, list[Timing]]) -> dict[str, Any]:
    """Medians, and the ratio of ours to theirs turn by turn: its median and its quartiles."""
    result: dict[str, Any] = {}
    for clock in ("seconds", "cpu_seconds"):
        rates = {name: [t.tokens / getattr(t, clock) for t in timings] for name, timings in found.items()}
        ratios = [a / b for a, b in zip(rates["lit_align"], rates["transformers"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        medians = {name: statistics.median(values) for name, values in rates.items()}
        result[f"tokens_per_{clock[:-1]}"] = medians | {
            "ratio": quartiles[1],
            "quartiles": [quartiles[0], quartiles[2]],
        }
    for name, timings in found.items():
        result[name] = {
            "tokens": statistics.median(t.tokens for t in timings),
            "cpu_seconds": statistics.median(t.cpu_seconds for t in timings),
        }
    return result


def lines(case: str, result: dict[str, Any]) -> list[str]:
    cells = [case]
    for clock in ("tokens_per_second", "tokens_per_cpu_second"):
        rate = result[clock]
        spread = f"{rate['ratio']:.2f} ({rate['quartiles'][0]:.2f} to {rate['quartiles'][1]:.2f})"
        cells += [f"{rate['lit_align']:.0f}", f"{rate['transformers']:.0f}", spread]
    cells += [f"{result[name]['cpu_seconds']:.2f}" for name in ("lit_align", "transformers")]
    return ["| " + " | ".join(cells) + " |"]


HEADER = [
    "| completions | tokens/s | transformers | ratio (quartiles) | tokens/CPU-s | transformers | ratio (quartiles) "
    "| CPU s | transformers |",
    "|---|---|---|---|---|---|---|---|---|",
]


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    torch.set_num_threads(given.threads)
    try:
        pair, tokenizer = trained_pair(given.model)
        prompts = read_prompts(given, tokenizer).to(next(pair.parameters()).device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = {}
    for case, stops in (("that end", pair.stop_ids), ("of full length", [])):
        pair.stop_ids = stops
        ways = {"lit_align": ours(pair, prompts, given), "transformers": theirs(pair, prompts, given)}
        results[case] = summary(measure(ways, given.repeats))
    rows = [line for case, result in results.items() for line in lines(case, result)]
    print("\n".join([*HEADER, *rows]))
    if given.out:
        settings = {name: value for name, value in vars(given).items() if name != "out"}
        given.out.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
