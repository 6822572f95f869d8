"""Examples become groups of token ids: each text tokenized once, ended, and cut to its budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch

from lit_align.data.chat import TemplateRefused, render_completion, render_prompt, shorter_prompts
from lit_align.data.collate import Group
from lit_align.data.encoded import encode
from lit_align.data.formats import Example
from lit_align.data.messages import Text
from lit_align.data.report import SplitReport
from lit_align.data.rows import DataError, raise_bad_rows
from lit_align.data.transcripts import transcript_messages
from lit_align.specials import Specials, completion_ids, find_specials, unended

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Limits(NamedTuple):
    """Token budgets; ``max_prompt`` < ``max_total``.

    Attributes:
        max_total: Most tokens of a prompt and one completion together, >= 2.
        max_prompt: Most tokens of a prompt, >= 1; a completion so has at least ``max_total - max_prompt``.
    """

    max_total: int
    max_prompt: int


class _Rendered(NamedTuple):
    """An example as the texts to tokenize; ``templated`` text already holds its special tokens."""

    example: Example
    prompt: str
    completions: list[str]
    templated: bool


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    report: SplitReport,
    comparing: bool = True,
) -> list[Group]:
    """Tokenize examples.

    A prompt over its limit loses its first turns, or where no turn is left to lose its first tokens (what the tokenizer
    puts before a text stays). A completion over ``max_total`` less its prompt is cut on the right and then has no end
    of sequence, since it did not end there. Both are counted. Every other completion ends with exactly one end of
    sequence.

    Args:
        examples: From ``read_examples``.
        tokenizer: The policy's.
        limits: Token budgets.
        report: Receives what was shortened and dropped.
        comparing: Whether several completions that have become equal are of no use.

    Returns:
        One group for each example that is kept, in their order.

    Raises:
        DataError: If the tokenizer has no end of sequence, or no chat template where there are messages; if a template
            does not keep the prompt as a beginning or refuses a conversation; if a prompt begins with two beginnings of
            sequence.
    """
    specials = find_specials(tokenizer)
    rendered = _render_all(examples, tokenizer, specials, report)
    prompts = _prompt_ids(rendered, tokenizer, specials)
    problems = [
        f"{r.example.place}: {p}" for r, ids in zip(rendered, prompts, strict=True) if (p := _doubled(ids, specials))
    ]
    raise_bad_rows(report.source, problems, report.read)
    completions = iter(completion_ids(tokenizer, specials, [text for r in rendered for text in r.completions], encode))
    groups = []
    for one, ids in zip(rendered, prompts, strict=True):
        prompt = _shorten(one, ids, tokenizer, specials, limits, report)
        budget = limits.max_total - len(prompt)
        ended = [[*ids, specials.eos_id] for ids in islice(completions, len(one.completions))]
        group = _group(one.example, prompt, ended, budget, report, comparing)
        groups += [] if group is None else [group]
    return groups


def _group(
    example: Example,
    prompt: list[int],
    completions: list[list[int]],
    budget: int,
    report: SplitReport,
    comparing: bool,
) -> Group | None:
    if not prompt:
        report.drop("empty prompt", example.place)
        return None
    if any(len(ids) > budget for ids in completions):
        report.note("completion cut on the right", example.place)
    cut = [ids[:budget] for ids in completions]
    if comparing and len(cut) > 1 and all(ids == cut[0] for ids in cut[1:]):
        report.drop("identical after tokenization and cutting", example.place)
        return None
    tensors = [torch.tensor(ids, dtype=torch.int32) for ids in cut]
    return Group(example.row, torch.tensor(prompt, dtype=torch.int32), tensors, example.rewards)


def _render_all(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, specials: Specials, report: SplitReport
) -> list[_Rendered]:
    rendered, problems = [], []
    for example in examples:
        try:
            one = _render(example, tokenizer, specials, report)
            rendered += [] if one is None else [one]
        except TemplateRefused as problem:
            problems.append(f"{example.place}: {problem}")
    raise_bad_rows(report.source, problems, report.read)
    return rendered


def _render(
    example: Example, tokenizer: PreTrainedTokenizerBase, specials: Specials, report: SplitReport
) -> _Rendered | None:
    """Text stays text; messages, and transcripts where there is a template, are rendered. None if dropped."""
    templated = tokenizer.chat_template is not None
    if example.transcript and templated:
        example = _as_conversation(example)
        if not example.prompt or example.prompt[-1]["role"] != "user":  # type: ignore[index]
            report.drop("no human turn before the completion", example.place)
            return None
    if isinstance(example.prompt, str):
        texts = [unended(text, specials) for text in example.completions if isinstance(text, str)]
        return _without_empty(_Rendered(example, example.prompt, texts, templated=False), report)
    if not templated:
        raise DataError(
            f'{example.place}: the row holds messages, but the tokenizer of "{tokenizer.name_or_path}" has no chat '
            "template; use an instruction-tuned model, set the tokenizer's chat_template, or give prompts and "
            "completions as plain text"
        )
    prompt = render_prompt(example.prompt, tokenizer)
    texts = [
        unended(render_completion(prompt, example.prompt, text, tokenizer, example.place), specials, strip=True)
        for text in example.completions
        if not isinstance(text, str)
    ]
    return _without_empty(_Rendered(example, prompt, texts, templated=True), report)


def _without_empty(one: _Rendered, report: SplitReport) -> _Rendered | None:
    """The same without completions that were the end of sequence alone; None if too few are left to be of use."""
    kept = [number for number, text in enumerate(one.completions) if text.strip()]
    if len(kept) == len(one.completions):
        return one
    example = one.example
    if len(kept) < min(2, len(one.completions)):
        report.drop("empty completion", example.place)
        return None
    rewards = None if example.rewards is None else [example.rewards[number] for number in kept]
    if rewards is not None and len(rewards) > 1 and len(set(rewards)) == 1:
        report.drop("all rewards equal", example.place)
        return None
    report.note("empty completion left out of a group", example.place)
    example = example._replace(completions=[example.completions[number] for number in kept], rewards=rewards)
    return one._replace(example=example, completions=[one.completions[number] for number in kept])


def _as_conversation(example: Example) -> Example:
    """A transcript's prompt and completions as messages."""
    completions: list[Text] = [
        [{"role": "assistant", "content": text.strip()}] for text in example.completions if isinstance(text, str)
    ]
    return example._replace(prompt=transcript_messages(str(example.prompt)), completions=completions)


def _prompt_ids(
    rendered: Sequence[_Rendered], tokenizer: PreTrainedTokenizerBase, specials: Specials
) -> list[list[int]]:
    """Prompts without what a tokenizer appends; what it puts before a text only where no template wrote it."""
    bare = encode(tokenizer, [one.prompt for one in rendered])
    return [ids if one.templated else specials.before + ids for one, ids in zip(rendered, bare, strict=True)]


def _doubled(ids: list[int], specials: Specials) -> str | None:
    """What is wrong where a prompt begins with two beginnings of sequence, else None."""
    if specials.bos_id is None or ids[:2] != [specials.bos_id] * 2:
        return None
    return (
        f'the prompt begins with two beginning-of-sequence tokens "{specials.bos}" (id {specials.bos_id}); the '
        "tokenizer or the chat template adds one already, so remove it from the text"
    )


def _shorten(
    one: _Rendered,
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    specials: Specials,
    limits: Limits,
    report: SplitReport,
) -> list[int]:
    """Cut a prompt to its limit on the left: whole turns if that is enough, else tokens."""
    if len(ids) <= limits.max_prompt:
        return ids
    for shorter in shorter_prompts(one.example.prompt, one.example.transcript):
        try:
            text = shorter if isinstance(shorter, str) else render_prompt(shorter, tokenizer)
        except TemplateRefused:  # such as one that wants a system message
            continue
        fewer = _prompt_ids([one._replace(prompt=text)], tokenizer, specials)[0]
        if len(fewer) <= limits.max_prompt:
            report.note("prompt lost its first turns", one.example.place)
            return fewer
    head = specials.before if ids[: len(specials.before)] == specials.before else []
    room = limits.max_prompt - len(head)
    if room < 1:
        raise DataError(
            f"{one.example.place}: max_prompt_length={limits.max_prompt} leaves no room for the prompt after the "
            f"{len(head)} tokens the tokenizer puts before a text; set max_prompt_length to {len(head) + 1} or more"
        )
    report.note("prompt cut on the left", one.example.place)
    return head + ids[-room:]
