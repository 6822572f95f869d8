"""Render a conversation by the tokenizer's chat template and separate its prompt from its completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lit_align.data.messages import Message, Text, shorter_conversations
from lit_align.data.rows import DataError
from lit_align.data.transcripts import shorter_transcripts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TemplateRefused(Exception):
    """The template raised an error of its own about a conversation."""


def render_prompt(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text up to where the assistant begins to write.

    Raises:
        TemplateRefused: If the template does not accept the conversation.
    """
    return _render(messages, tokenizer, add_generation_prompt=True)


def render_completion(
    prompt: str, messages: list[Message], completion: list[Message], tokenizer: PreTrainedTokenizerBase, place: str
) -> str:
    """The text of a completion: what the template writes for the whole conversation, less the prompt.

    Args:
        prompt: The rendered prompt.
        messages: The prompt's messages.
        completion: One assistant message.
        tokenizer: Has a chat template.
        place: Where the row is, for the error.

    Raises:
        DataError: If the whole conversation does not begin with the prompt, with the differing text.
        TemplateRefused: If the template does not accept the conversation.
    """
    whole = _render([*messages, *completion], tokenizer, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise DataError(_differing(prompt, whole, place))
    return whole[len(prompt) :]


def shorter_prompts(prompt: Text, transcript: bool) -> Iterator[Text]:
    """The same prompt without its first turns, longest first; none for running text."""
    if not isinstance(prompt, str):
        yield from shorter_conversations(prompt)
    elif transcript:
        yield from shorter_transcripts(prompt)


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool) -> str:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise TemplateRefused(f"the chat template refuses the conversation: {error}") from error
    return str(text)


def _differing(prompt: str, whole: str, place: str) -> str:
    """Where the two texts part, with a little of both."""
    most = min(len(prompt), len(whole))
    at = next((number for number in range(most) if prompt[number] != whole[number]), most)
    return (
        f"{place}: the chat template does not keep the prompt as the beginning of the whole conversation, so the "
        f"completion's tokens cannot be told from the prompt's. From character {at} the prompt reads "
        f"{prompt[at : at + 60]!r}, the whole conversation {whole[at : at + 60]!r}. Use a tokenizer whose template "
        "only appends (one that rewrites or removes earlier text does not), or give prompts "
        "and completions as plain text"
    )
