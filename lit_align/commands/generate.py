"""What policy and reference write, side by side.

With --prompt or --prompts they answer and end. Without, prompts are read line by line; where the tokenizer has a chat
template it is a conversation, which goes on with the policy's answers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import rich
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_align.callbacks.draws import Draw
from lit_align.commands.arguments import Drawing, Loading, parse
from lit_align.commands.drawing import draw_many
from lit_align.commands.prompts import example_of, lines_of, tokenized
from lit_align.commands.runs import Opened, find_run, load, opened
from lit_align.data.formats import Example
from lit_align.data.messages import Message
from lit_align.data.text import Limits
from lit_align.errors import UserError
from lit_align.settings import check

MODELS = ("policy", "reference")
LEAVE, AGAIN = "/quit", "/new"


@dataclass(frozen=True)
class Generate:
    """What is written, and for which prompts.

    Attributes:
        run: Run folder, or the folder of an adapter.
        prompt: One prompt.
        prompts: A file of prompts: .txt with one a line, or rows in any format of docs/data.md.
        completions: Completions of each prompt by each model, >= 1.
        plain: Continue prompts as running text, although the tokenizer has a chat template.
        out: File for the completions, .jsonl, which must not exist; None writes none.
    """

    run: str
    prompt: str | None = None
    prompts: str | None = None
    completions: int = 1
    plain: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        check("completions", self.completions, self.completions >= 1, "1 or more", "1")
        if self.prompt is not None and self.prompts is not None:
            raise UserError("give --prompt or --prompts, not both")
        if self.out is not None and Path(self.out).exists():
            raise UserError(f"out={self.out} exists; choose another name")
        if self.prompts is not None and not Path(self.prompts).exists():
            raise UserError(f"prompts={self.prompts}: there is no such file")


def run(args: Sequence[str]) -> None:
    """Answer the prompts given, or those that are typed."""
    options, drawing, loading = parse("generate", args, __doc__, Generate, Drawing, Loading)
    writer = Writer(opened(find_run(options.run), loading), options, drawing)
    if options.prompts is not None:
        writer.answer([writer.opened(one) for one in lines_of(options.prompts)])
    elif options.prompt is not None:
        writer.answer([writer.opened(example_of(options.prompt))])
    else:
        converse(writer)


class Writer:
    """Draws, shows and writes down answers of both models.

    Args:
        ready: The run.
        options: How many, and where to.
        drawing: How they are drawn.

    Raises:
        UserError: If the budget of new tokens leaves no room for a prompt.
    """

    def __init__(self, ready: Opened, options: Generate, drawing: Drawing) -> None:
        self.options, self.drawing = options, drawing
        room = ready.context - drawing.max_new_tokens
        accepted = f"below the {ready.context} tokens the model reads"
        check("max_new_tokens", drawing.max_new_tokens, room >= 1, accepted, "64")
        self.limits = Limits(ready.context, room)
        self.templated = ready.tokenizer.chat_template is not None and not options.plain
        self.loaded = load(ready)

    def opened(self, example: Example) -> Example:
        """A text as a user's message where there is a chat template; messages stay."""
        if not self.templated or not isinstance(example.prompt, str) or example.transcript:
            return example
        return example._replace(prompt=[{"role": "user", "content": example.prompt}])

    def answer(self, examples: Sequence[Example]) -> str:
        """Draw, show and write down; the first answer of the policy to the last prompt is returned.

        Raises:
            UserError: If no prompt is left.
        """
        batch = tokenized(examples, self.loaded.tokenizer, self.limits)
        drawn = {
            name: draw_many(self.loaded, batch, self.options.completions, self.drawing, reference=name == "reference")
            for name in MODELS
        }
        rich.get_console().print(side_by_side(drawn, with_prompt=len(examples) > 1))
        if self.options.out is not None:
            with Path(self.options.out).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(drawn))
        self.drawing = replace(self.drawing, seed=self.drawing.seed + 1)  # the next turn is drawn anew
        return drawn["policy"].completions[-1][0]


def rows(drawn: dict[str, Draw]) -> Iterator[dict[str, object]]:
    """One record for each completion, as it is written down."""
    for name, one in drawn.items():
        yield from ({"model": name, **{key: row[key] for key in row if key != "step"}} for row in one.rows())


def side_by_side(drawn: dict[str, Draw], with_prompt: bool) -> Table:
    """A row for each completion: policy and reference, " …" where the budget cut it."""
    table = Table(show_lines=True)
    for column in (["prompt"] if with_prompt else []) + list(MODELS):
        table.add_column(column, overflow="fold", ratio=1)
    for i, prompt in enumerate(drawn["policy"].prompts):
        for k in range(len(drawn["policy"].completions[i])):
            cells = [escape(_shown(drawn[name], i, k)) for name in MODELS]
            table.add_row(*([escape(prompt) if k == 0 else ""] if with_prompt else []), *cells)
    return table


def _shown(one: Draw, i: int, k: int) -> str:
    return one.completions[i][k].strip() + ("" if one.ended[i, k] else " …")


def converse(writer: Writer) -> None:
    """Read lines until the end of input or ``/quit``; ``/new`` begins another conversation."""
    console = Console(stderr=True)
    kind = f"conversation with the policy's answers, {AGAIN} begins another" if writer.templated else "one text a line"
    if sys.stdin.isatty():
        console.print(f"{kind}; {LEAVE} or Ctrl-D ends", highlight=False)
    said: list[Message] = []
    for line in _lines(console):
        if line == AGAIN:
            said = []
        elif not writer.templated:
            writer.answer([example_of(line)])
        else:
            said.append({"role": "user", "content": line})
            answer = writer.answer([example_of(list(said))])
            said.append({"role": "assistant", "content": answer.strip()})


def _lines(console: Console) -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == LEAVE:
            return
        if line:
            yield line
