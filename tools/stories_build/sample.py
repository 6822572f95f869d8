"""Stage 1: stories from a teacher, many rows at a time, in files that a second run does not draw again."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from .text import clean


class SampleSettings(NamedTuple):
    """What the sampling stage does.

    Attributes:
        teacher: Directory or Hub name of a causal LM that starts a story after its BOS token.
        batches: Files to draw, > 0.
        rows: Rows of a batch, > 0.
        tokens: Tokens of a row, BOS included, at most the teacher's context.
        temperature: Divides the logits, > 0.
        varied: The first so many tokens of a row are drawn at temperature 1 instead, for variety.
        pieces: Only the teacher's most likely pieces are drawn: that many, > 0. It makes the output layer small.
        seed: Batch i is drawn with seed + i.
        device: Where to compute.
        workers: Processes, > 0; each computes on ``threads`` threads.
        threads: CPU threads of a worker.
    """

    teacher: str
    batches: int
    rows: int
    tokens: int
    temperature: float
    varied: int
    pieces: int
    seed: int
    device: str
    workers: int
    threads: int

    @property
    def temperatures(self) -> list[float]:
        """The temperature of each token that is drawn for a row."""
        return [1.0 if index < self.varied else self.temperature for index in range(self.tokens - 1)]


class _Buffer(DynamicLayer):
    """Keys and values of one layer in a buffer of known size: growing it copies nothing."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.used = tokens, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, (rows, heads, new, width) each; returns all so far."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._keys = key_states.new_empty(*key_states.shape[:2], self.tokens, key_states.shape[3])
            self._values = torch.empty_like(self._keys)
        first, self.used = self.used, self.used + key_states.shape[2]
        self._keys[:, :, first : self.used], self._values[:, :, first : self.used] = key_states, value_states
        self.keys, self.values = self._keys[:, :, : self.used], self._values[:, :, : self.used]
        return self.keys, self.values


class Sampler:
    """Draws rows of text from a causal LM.

    Args:
        model: A causal LM with an output layer without bias.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        head = model.get_output_embeddings().weight.detach()
        self.head, self.pieces = head, torch.arange(len(head), device=head.device)

    def restrict(self, mass: Tensor, count: int) -> None:
        """Draw only the ``count`` pieces of the largest probability mass, (V,)."""
        self.pieces = mass.topk(min(count, len(mass))).indices.sort().values
        self.head = self.head[self.pieces]

    @torch.inference_mode()
    def draw(self, first: Tensor, temperatures: Sequence[float], mass: Tensor | None = None) -> Tensor:
        """Continue each row of ``first``, (rows, n), by a token per temperature: (rows, n + len(temperatures)).

        Args:
            first: What the rows begin with; no padding.
            temperatures: What the logits are divided by, each > 0.
            mass: (V,) accumulator of the probabilities drawn from, changed in place; None keeps no account.
        """
        cache = DynamicCache(config=self.model.config)
        cache.layers = [_Buffer(first.shape[1] + len(temperatures)) for _ in cache.layers]
        rows = [first]
        for temperature in temperatures:
            hidden = self.model.get_decoder()(input_ids=rows[-1], past_key_values=cache, use_cache=True)
            logits = (hidden.last_hidden_state[:, -1] @ self.head.T).float() / temperature
            cumulated = logits.softmax(-1).cumsum(-1)
            if mass is not None:
                mass += cumulated.diff(dim=-1, prepend=cumulated.new_zeros(len(first), 1)).sum(0)
            threshold = torch.rand(len(first), 1, device=first.device) * cumulated[:, -1:]
            rows.append(self.pieces[torch.searchsorted(cumulated, threshold).clamp_(max=len(self.pieces) - 1)])
        return torch.cat(rows, 1)


def teacher_sampler(settings: SampleSettings) -> tuple[Sampler, Any]:
    """The teacher's sampler, restricted to its likely pieces, and the teacher's tokenizer."""
    torch.set_num_threads(settings.threads)
    model = AutoModelForCausalLM.from_pretrained(settings.teacher, dtype=torch.float32).to(settings.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings.teacher)
    sampler = Sampler(model)
    torch.manual_seed(settings.seed)
    mass = torch.zeros(len(sampler.pieces), device=settings.device)
    first = torch.full((min(64, settings.rows), 1), tokenizer.bos_token_id, device=settings.device)
    sampler.draw(first, settings.temperatures, mass)
    sampler.restrict(mass, settings.pieces)
    kept = (mass[sampler.pieces].sum() / mass.sum()).item()
    print(f"{len(sampler.pieces)} of {len(mass)} pieces hold {kept:.2%} of the teacher's probability", flush=True)
    return sampler, tokenizer


def split(ids: list[int], separator: int) -> list[tuple[list[int], bool]]:
    """The stories of a row and whether each ended: a separator begins a story and ends the one before."""
    parts: list[list[int]] = []
    for token in ids:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return [(part, index < len(parts) - 1) for index, part in enumerate(parts)]


def _work(settings: SampleSettings, folder: Path, numbers: list[int]) -> None:
    sampler, tokenizer = teacher_sampler(settings)
    first = torch.full((settings.rows, 1), tokenizer.bos_token_id, device=settings.device)
    for number in numbers:
        torch.manual_seed(settings.seed + 1 + number)
        lines = []
        for row in sampler.draw(first, settings.temperatures).tolist():
            for ids, ended in split(row, tokenizer.bos_token_id):
                story = clean(tokenizer.decode(ids, skip_special_tokens=True), ended)
                if story is not None:
                    lines.append(json.dumps({"sentences": story.sentences, "ended": story.ended}))
        partial = folder / f"{number:05d}.partial"
        partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        partial.rename(folder / f"{number:05d}.jsonl")
        print(f"batch {number}: {len(lines)} stories of {settings.rows} rows", flush=True)


def sample(settings: SampleSettings, work: Path) -> None:
    """Draw the batches that ``work``/stories does not hold yet."""
    folder = work / "stories"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(settings.batches) if not (folder / f"{number:05d}.jsonl").exists()]
    shares = [share for worker in range(settings.workers) if (share := missing[worker :: settings.workers])]
    if len(shares) <= 1:
        for share in shares:
            _work(settings, folder, share)
        return
    with ProcessPoolExecutor(len(shares), mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(_work, settings, folder, share) for share in shares]:
            future.result()
