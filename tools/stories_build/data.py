"""Stages 4 and 5: scenes and continuations to fine-tune on, and the labelled rows the fine-tuned policy writes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .model import IGNORED, pack
from .sample import Sampler
from .text import Story, by_scene, scene_length


class Row(NamedTuple):
    """A prompt, its completions, and the reward of each."""

    prompt: str
    completions: list[str]
    rewards: list[float]

    @property
    def spread(self) -> float:
        """Best reward less the worst."""
        return max(self.rewards) - min(self.rewards)


def continuations(
    stories: Sequence[Story], judge: Callable[[str], float], positive_share: float, seed: int
) -> list[tuple[str, str]]:
    """Scenes and the one to three sentences that follow them in a story, with a leading space; two lengths a story.

    Stories for children are cheerful. So that alignment towards cheerfulness has something to do, the positive
    continuations are thinned: each with a score over 0.3 stays with probability ``positive_share``.

    Args:
        stories: Where to take them from.
        judge: Score of a continuation, in [-1, 1].
        positive_share: In (0, 1].
        seed: Of the lengths and of the thinning.
    """
    draw = random.Random(seed)
    found = []
    for prompt, group in by_scene(stories).items():
        for story in group:
            rest = story.sentences[scene_length(story) :]
            for count in draw.sample((1, 2, 3), 2):
                completion = "".join(" " + sentence for sentence in rest[:count])
                if count <= len(rest) and (judge(completion) <= 0.3 or draw.random() < positive_share):
                    found.append((prompt, completion))
    draw.shuffle(found)
    return found


def fine_tuning_rows(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, tokens: int, budget: int
) -> tuple[Tensor, Tensor]:
    """Ids and labels, (rows, tokens) each: BOS, scene, continuation, EOS, packed; only the last two have labels.

    Pairs whose continuation and EOS exceed ``budget`` tokens are left out.
    """
    ids, labels = [], []
    for prompt, completion in pairs:
        before = tokenizer(prompt).input_ids
        after = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if len(after) <= budget:
            ids.append(before + after)
            labels.append([IGNORED] * len(before) + after)
    return pack(ids, tokens), pack(labels, tokens)


class Draws(NamedTuple):
    """Completions that were drawn, and what was seen on the way.

    Attributes:
        rows: One per prompt that got all its completions, in the order of the prompts.
        drawn: Completions drawn.
        ended: Of these, how many ended by EOS within the budget.
        retokenized: Of these, how many are distinct, begin with a space, and give the sampled ids when their text is
            tokenized again; only such are kept.
        tokens: Tokens of those kept, EOS included.
        mean: Mean reward of all that ended, chosen or not.
    """

    rows: list[Row]
    drawn: int
    ended: int
    retokenized: int
    tokens: int
    mean: float


def draw_rows(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    judge: Callable[[str], float],
    completions: int,
    budget: int,
    seed: int,
) -> Draws:
    """Draw completions of each prompt at temperature 1, over the whole vocabulary, and keep the first that end.

    One more than needed is drawn of each prompt; a prompt with too few that end, and whose text gives back their
    ids, is left out.

    Args:
        model: The fine-tuned policy.
        tokenizer: Ours.
        prompts: Texts.
        judge: Reward of a completion.
        completions: How many a prompt keeps, > 0.
        budget: Tokens of a completion, EOS included.
        seed: Of the draw.
    """
    torch.manual_seed(seed)
    sampler = Sampler(model.eval())
    rows, drawn, ended, retokenized, tokens, seen = [], 0, 0, 0, 0, []
    for prompt, samples in _drawn(sampler, tokenizer, prompts, completions + 1, budget):
        whole = [ids[: ids.index(tokenizer.eos_token_id)] for ids in samples if tokenizer.eos_token_id in ids]
        drawn, ended = drawn + len(samples), ended + len(whole)
        exact = {text: ids for text, ids in _texts(tokenizer, whole) if text.startswith(" ") and text.strip()}
        seen.extend(judge(tokenizer.decode(ids, skip_special_tokens=True)) for ids in whole)
        retokenized += len(exact)
        chosen = list(exact)[:completions]
        if len(chosen) == completions:
            rows.append(Row(prompt, chosen, [judge(text) for text in chosen]))
            tokens += sum(len(exact[text]) + 1 for text in chosen)
    order = {prompt: index for index, prompt in enumerate(prompts)}
    rows.sort(key=lambda row: order[row.prompt])
    return Draws(rows, drawn, ended, retokenized, tokens, fmean(seen or [0.0]))


def _texts(tokenizer: PreTrainedTokenizerFast, samples: Sequence[list[int]]) -> Iterator[tuple[str, list[int]]]:
    """The text of each sample, without those whose text has other ids when it is tokenized."""
    for ids in samples:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if tokenizer(text, add_special_tokens=False).input_ids == ids:
            yield text, ids


def _drawn(
    sampler: Sampler, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], each: int, budget: int
) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield each prompt with ``each`` samples of at most ``budget`` ids; prompts of equal length are drawn together."""
    groups: dict[int, list[tuple[str, list[int]]]] = {}
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        groups.setdefault(len(ids), []).append((prompt, ids))
    device = sampler.head.device
    for length, group in sorted(groups.items()):
        for first in range(0, len(group), 64):
            part = group[first : first + 64]
            begin = torch.tensor([ids for _, ids in part], device=device).repeat_interleave(each, 0)
            samples = sampler.draw(begin, [1.0] * budget)[:, length:].tolist()
            for index, (prompt, _) in enumerate(part):
                yield prompt, samples[index * each : (index + 1) * each]
