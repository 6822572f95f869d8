"""Drawing completions: what is drawn depends on the seed, the prompt's row and the column, not on what is drawn beside.

A prompt is read once for all its completions, and a completion that has ended leaves the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Rollout, Sampling
from lit_align.decoding import Decoding
from lit_align.logprobs import Head, exact_head, logits


def draw(
    begin: Callable[[], Decoding],
    head: Head,
    prompts: CompletionBatch,
    completions: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    together: int,
) -> Rollout:
    """Draw completions of each prompt.

    Args:
        begin: Gives a fresh ``Decoding`` of the model that is drawn from.
        head: Its vocabulary head, with the temperature of the draw.
        prompts: B prompts; their own completions are ignored.
        completions: Completions of each, >= 1.
        sampling: Length, truncation and seed of the draw.
        stop_ids: Token ids that end a completion; they count as its last token.
        together: Most completions that grow at once, >= 1.

    Returns:
        The prompts with K = ``completions`` columns, without reward, and ``old_logps``: the log-probs under the
        distribution each token was drawn from, nats, float32 (B, K, L), 0 at padding.
    """
    device, budget = prompts.prompt_ids.device, sampling.max_new_tokens
    ids = torch.full((len(prompts.row), completions, budget), -1, device=device)
    logps = torch.zeros(ids.shape, device=device)
    stops = torch.tensor(stop_ids, dtype=ids.dtype, device=device)
    for part, columns in _parts(prompts.prompt_mask.sum(-1), completions, together):
        rows = begin()
        copies = torch.arange(len(part), device=device).repeat_interleave(len(columns))
        hidden = rows.begin(prompts.prompt_ids[part], prompts.prompt_mask[part], copies)
        uniform = uniforms(sampling.seed, prompts.row[part].tolist(), columns.tolist(), budget).to(device)
        found = _grow(rows, hidden, head, uniform, sampling, stops)
        at = part[:, None], columns.to(device)
        ids[at], logps[at] = (values.unflatten(0, (len(part), len(columns))) for values in found)
    length = int((ids >= 0).sum(-1).max())
    ids, logps = ids[..., :length], logps[..., :length]
    present = torch.ones(ids.shape[:2], dtype=torch.bool, device=device)
    drawn = prompts._replace(completion_ids=ids.clamp(min=0), completion_mask=ids >= 0, reward=None, present=present)
    return Rollout(drawn, old_logps=logps)


def uniforms(seed: int, rows: Sequence[int], columns: Sequence[int], length: int) -> Tensor:
    """One stream of uniform numbers for each completion, a function of seed, row and column alone.

    Args:
        seed: Seed of the draw.
        rows: Row of each prompt in its source.
        columns: Number of each of its completions.
        length: Tokens of a completion; a longer stream begins as a shorter one.

    Returns:
        Numbers in [0, 1) of 53 bits, rows outermost, float64 (rows · columns, length).
    """
    return torch.stack([_stream(f"{seed} {row} {column}", length) for row in rows for column in columns])


def truncated(scores: Tensor, sampling: Sampling) -> Tensor:
    """Leave out what ``top_k``, and then ``top_p`` of the rest, leave out; tokens that tie with the last one stay.

    Args:
        scores: Logits after temperature, (R, V).
        sampling: Says which tokens are kept.

    Returns:
        The logits, -inf where a token is left out, (R, V).
    """
    if 0 < sampling.top_k < scores.shape[1]:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        ordered = scores.sort(descending=True).values
        mass = ordered.softmax(-1, dtype=torch.float64)
        kept = (mass.cumsum(-1) - mass < sampling.top_p).sum(-1, keepdim=True)
        least = ordered.gather(1, kept.clamp(min=1) - 1)
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores


def choose(scores: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token where the distribution function, in the order of the vocabulary, passes a uniform number.

    Sums are taken in float64: in float32 the last of 100,000 tokens would be off by a percent.

    Args:
        scores: Logits, (R, V).
        uniform: Numbers in [0, 1), float64 (R,).

    Returns:
        The tokens, int64 (R,), and their log-probs in nats, float32 (R,); NaN where a logit is.
    """
    top = scores.amax(-1, keepdim=True)
    mass = (scores - top).exp_().cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    # u < 1 in float64 keeps u · total below the total; only NaN can lead past the end.
    token = torch.searchsorted(mass, uniform[:, None] * total, right=True).clamp_(max=scores.shape[1] - 1)
    logp = scores.gather(1, token) - top - total.log()
    return token[:, 0], logp[:, 0].float()


def _parts(lengths: Tensor, completions: int, together: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompts and columns that are drawn together: prompts of like length, in even parts."""
    prompts = max(1, together // completions)
    columns = torch.arange(completions).tensor_split(-(-completions // together))
    for part in lengths.argsort(stable=True).tensor_split(-(-len(lengths) // prompts)):
        for some in columns:
            yield part, some


def _grow(
    rows: Decoding, hidden: Tensor, head: Head, uniform: Tensor, sampling: Sampling, stops: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids of R completions, -1 after the end, and their log-probs, (R, budget) each."""
    ids = torch.full(uniform.shape, -1, device=uniform.device)
    logps = torch.zeros(uniform.shape, device=uniform.device)
    place = torch.arange(len(ids), device=ids.device)
    head = exact_head(head, hidden)
    for step in range(ids.shape[1]):
        token, logps[place, step] = choose(truncated(logits(hidden, head), sampling), uniform[place, step])
        ids[place, step] = token
        index = _going_on(torch.isin(token, stops, invert=True))
        if len(index) == 0 or step + 1 == ids.shape[1]:
            break
        if len(index) < len(place):
            rows.keep(index)
            place, token = place[index], token[index]
        hidden = rows.step(token)
    return ids, logps


def _going_on(live: Tensor) -> Tensor:
    """Which rows go on: each live one keeps its place or takes that of one before it that has ended, int64 (R',)."""
    count = int(live.sum())
    index = torch.arange(count, device=live.device)
    if count < len(live):
        index[~live[:count]] = live[count:].nonzero()[:, 0] + count
    return index


def _stream(name: str, length: int) -> Tensor:
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.rand(length, generator=generator, dtype=torch.float64)
