"""Rewards that judge completions; each implements ``lit_align.protocols.Reward``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_align.adapters import as_held
from lit_align.batch import CompletionBatch
from lit_align.errors import UserError
from lit_align.models import load_tokenizer
from lit_align.settings import LoraSettings, PairSettings
from lit_align.specials import Specials, completion_ids, find_specials, ids_of, unended

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Vader:
    """Sentiment of the completion by VADER's lexicon and rules (Hutto and Gilbert, ICWSM 2014), offline.

    The words' valences, after rules for negation, emphasis and punctuation, sum to x, and the compound score is
    x / sqrt(x² + 15), in [-1, 1]: 1 is most positive. The prompt does not count; a text without a word of the
    lexicon scores 0.

    Raises:
        ModuleNotFoundError: If vaderSentiment is not installed.
    """

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the reward lit_align.rewards.Vader needs the package vaderSentiment: pip install vaderSentiment",
                name=error.name,
            ) from error
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The compound score of each completion, in [-1, 1].

        Args:
            prompts: One per completion; not judged.
            completions: Texts to judge.

        Raises:
            ValueError: If the two differ in length.
        """
        _check_lengths(prompts, completions)
        return [float(self._analyzer.polarity_scores(text)["compound"]) for text in completions]


class Length:
    """Rewards of the length tasks of arXiv 2404.14367: shorter is better, or nearer to a given length.

        r(y) = -|y|,   or   r(y) = -| |y| - target |

    |y| counts the policy's own tokens, end of sequence included, so texts alone cannot be judged.

    Args:
        target: The best length in tokens, >= 1; None wants the shortest.

    Raises:
        UserError: If ``target`` is below 1.
    """

    def __init__(self, target: int | None = None) -> None:
        if target is not None and target < 1:
            raise UserError(f"target is {target}; it must be 1 or more, or left out to want the shortest")
        self.target = target

    def on_tokens(self, batch: CompletionBatch, tokenizer: Any) -> Tensor:
        """The reward of each completion in tokens, float32 (B, K)."""
        lengths = batch.lengths.float()
        return -lengths if self.target is None else -(lengths - self.target).abs()

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Refuse: tokens are not known from texts.

        Raises:
            UserError: Always.
        """
        raise UserError("lit_align.rewards.Length counts tokens, and only texts are known here")


class TrainedReward:
    """The reward of a model trained by the objective ``RewardModel``.

    Prompt and completion are joined as they are, like rows of plain text in training; an end of sequence is added to
    each completion. Nothing is cut. A prompt that begins with the tokenizer's own beginning of sequence, such as one
    rendered by a chat template, gets no second.

    Args:
        path: The folder ``adapter`` of the run.
        standardize: Whether to take off the mean of the validation rewards and divide by their standard deviation.
        batch_size: Completions of a forward pass, >= 1; those of one prompt share it.
        device: "auto" is a GPU if there is one, for each of several processes one of its own.

    Raises:
        UserError: If the folder is not that of a trained reward, its base model cannot be loaded, or there is no mean
            to standardize by.
    """

    def __init__(
        self, path: str | Path, standardize: bool = True, batch_size: int = 16, device: torch.device | str = "auto"
    ) -> None:
        from lit_align.pair import PolicyReferencePair

        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be 1 or more (16 is usual)")
        about, head = _read_head(Path(path))
        self.mean, self.std = _scale(Path(path), about) if standardize else (0.0, 1.0)
        self.batch_size = batch_size
        base = {name: about[name] for name in ("model", "revision", "dtype", "quantization")}
        settings = as_held(PairSettings(**base, lora=LoraSettings(adapter=str(path))), Path(path))
        self.tokenizer = load_tokenizer(settings)
        self._specials = find_specials(self.tokenizer)
        self.device = own_device() if device == "auto" else torch.device(device)
        self._judged: PreTrainedTokenizerBase | None = None
        self._same = False
        self._head = head.to(self.device)
        self._pair = PolicyReferencePair(settings, self.device).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The reward of each completion.

        Args:
            prompts: One per completion; equal ones are best neighbours.
            completions: Texts to judge.

        Raises:
            ValueError: If the two differ in length.
        """
        _check_lengths(prompts, completions)
        rewards: list[float] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch, column = self._batch(prompts[part], completions[part])
            found = self._rewards(batch)
            rewards += [found[at].item() for at in column]
        return rewards

    @torch.no_grad()
    def on_tokens(self, batch: CompletionBatch, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
        """The reward of each completion, float32 (B, K), from the ids as they are; None for another vocabulary.

        Args:
            batch: B prompts with K completions each. One that was cut is judged as it is, without an end of sequence.
            tokenizer: Of its ids.
        """
        if not self._reads(tokenizer):
            return None
        groups = max(1, self.batch_size // batch.present.shape[1])
        parts = [batch.rows(slice(i, i + groups)) for i in range(0, len(batch.row), groups)]
        return torch.cat([self._rewards(part) for part in parts])

    def _rewards(self, batch: CompletionBatch) -> Tensor:
        hidden = self._pair.final_hidden(batch.to(self.device)).float()
        return ((hidden @ self._head[0]) - self.mean).div(self.std).cpu()

    def _reads(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether ids of a tokenizer mean the same to the model of this reward; looked up once for each tokenizer."""
        if self._judged is not tokenizer:
            same = tokenizer.get_vocab() == self.tokenizer.get_vocab()
            self._same = same and tokenizer.eos_token_id == self.tokenizer.eos_token_id
            self._judged = tokenizer
        return self._same

    def _completion_ids(self, completions: Sequence[str]) -> list[list[int]]:
        """Token ids of each, with one end of sequence."""
        bare = [unended(text, self._specials) for text in completions]
        return [[*ids, self._specials.eos_id] for ids in completion_ids(self.tokenizer, self._specials, bare)]

    def _batch(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> tuple[CompletionBatch, list[tuple[int, int]]]:
        """A group for each distinct prompt, and the group and column of each completion."""
        distinct = list(dict.fromkeys(prompts))
        groups: list[list[Tensor]] = [[] for _ in distinct]
        column = []
        for prompt, ids in zip(prompts, self._completion_ids(completions), strict=True):
            group = distinct.index(prompt)
            column.append((group, len(groups[group])))
            groups[group].append(torch.tensor(ids, dtype=torch.long))
        width = max(map(len, groups))
        empty = torch.empty(0, dtype=torch.long)
        flat = [ids for group in groups for ids in [*group, *[empty] * (width - len(group))]]
        texts = [
            torch.tensor(_prompt_ids(self.tokenizer, self._specials, prompt), dtype=torch.long) for prompt in distinct
        ]
        asked, asked_mask = _padded(texts)
        given, given_mask = _padded(flat)
        present = torch.tensor([[k < len(group) for k in range(width)] for group in groups])
        shape = (len(distinct), width, -1)
        row = torch.arange(len(distinct))
        return CompletionBatch(asked, asked_mask, given.view(shape), given_mask.view(shape), None, present, row), column


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, specials: Specials, prompt: str) -> list[int]:
    """Token ids of a prompt with what the tokenizer puts before a text, once."""
    (ids,) = ids_of(tokenizer, [prompt])
    before = specials.before
    return ids if ids[: len(before)] == before else before + ids


def _padded(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(ids) for ids in sequences])
    return pad_sequence(list(sequences), batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]


def _read_head(path: Path) -> tuple[dict[str, Any], Tensor]:
    """What ``reward.json`` says, and the weight of the head, float32 (1, H)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    missing = [name for name in ("reward.json", "reward_head.safetensors") if not (path / name).is_file()]
    if missing:
        inside = (path / "adapter" / "reward.json").is_file()
        remedy = f"did you mean {path / 'adapter'}?" if inside else "give the folder adapter of a run of RewardModel"
        raise UserError(f"{path} is no trained reward: it holds no {' and no '.join(missing)}; {remedy}")
    try:
        about = json.loads((path / "reward.json").read_text(encoding="utf-8"))
        wanted = ("model", "revision", "dtype", "quantization")
        return {name: about[name] for name in wanted} | about, load_file(path / "reward_head.safetensors")["weight"]
    except (ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} is no trained reward that can be read: {type(error).__name__} {error}") from error


def _scale(path: Path, about: dict[str, Any]) -> tuple[float, float]:
    mean, std = about.get("mean"), about.get("std")
    if mean is None or not std:
        raise UserError(
            f"{path / 'reward.json'} holds no mean and standard deviation, since there were no validation rows, or "
            "none that differ; train with some, or set standardize=False"
        )
    return float(mean), float(std)


def _check_lengths(prompts: Sequence[str], completions: Sequence[str]) -> None:
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions: give one prompt per completion")


def own_device() -> torch.device:
    """The GPU of this process, by its number: rewards are built before a launcher has chosen one; or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    return torch.device("cuda", torch.cuda.current_device() if rank is None else int(rank) % torch.cuda.device_count())
