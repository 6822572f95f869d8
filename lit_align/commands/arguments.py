"""Arguments of the subcommands: each is a frozen dataclass, whose docstring is the help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser

from lit_align.batch import Sampling
from lit_align.errors import UserError
from lit_align.mistakes import explain, user_error_in
from lit_align.places import remember_folder
from lit_align.settings import check

PROGRAM = "python -m lit_align"


class CommandParser(ArgumentParser):
    """jsonargparse's parser with errors of a line or two instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message in the user's words.

        Raises:
            UserError: Always, except in parsers of nested values, whose errors jsonargparse itself puts together.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        if (own := user_error_in(ex)) is not None:
            raise own
        if "arguments are required" in message:
            wanted = ", ".join(name.upper() for name in message.split(":", 1)[1].replace(",", " ").split())
            raise UserError(f"{wanted} is missing; see {self.prog} --help") from ex
        keys = [str(action.dest) for action in self._actions]
        raise UserError(explain(message, getattr(self, "args", []), keys)) from ex


def parse(name: str, args: Sequence[str], about: str | None, *kinds: type) -> list[Any]:
    """Read the command line of a subcommand.

    Args:
        name: The subcommand.
        args: What follows it.
        about: Its description, for the help.
        kinds: Dataclasses whose fields are the options; a field of the first without a default is positional, and
            takes one or more values if it is a list.

    Returns:
        An object of each kind.

    Raises:
        UserError: If an option is unknown, missing or out of range.
    """
    remember_folder()
    parser = CommandParser(prog=f"{PROGRAM} {name}", description=about, exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    for kind in kinds:
        several = {
            field.name for field in fields(kind) if str(field.type).startswith("list") and field.default is MISSING
        }
        about_each = {one.arg_name: one.description for one in docstring_parser.parse(kind.__doc__ or "").params}
        for one in several:  # jsonargparse would want a list in brackets
            parser.add_argument(one, nargs="+", type=str, help=f"{about_each[one]} They stand with spaces between.")
        parser.add_class_arguments(kind, as_positional=True, skip=several)
    found = parser.instantiate(parser.parse_args(list(args)))
    return [kind(**{field.name: found[field.name] for field in fields(kind)}) for kind in kinds]


@dataclass(frozen=True)
class Loading:
    """How a policy and its reference are held.

    Attributes:
        model: Base model in the place of the one the run or the adapter names, such as a folder that has moved.
        dtype: Type of the base's weights; None is the run's.
        quantization: How the base is held; None is the run's.
        device: "auto" is a GPU if there is one; else cpu, cuda or cuda:1.
    """

    model: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    quantization: Literal["auto", "none", "nf4", "int8"] | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Drawing:
    """How completions are drawn.

    Attributes:
        max_new_tokens: Token budget of a completion, >= 1.
        temperature: Divides the logits, > 0; None is the one of training.
        top_k: Keep the k likeliest tokens, >= 0; 0 keeps all, 1 is greedy.
        top_p: Keep the likeliest tokens of this mass, in (0, 1]; 1 keeps all.
        seed: Seed of the draws.
    """

    max_new_tokens: int = 64
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more", "64")
        warmth = 1.0 if self.temperature is None else self.temperature
        check("temperature", warmth, warmth > 0, "greater than 0; --top_k 1 is greedy", "1")
        check("top_k", self.top_k, self.top_k >= 0, "0 or more, where 0 keeps all", "0")
        check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]", "1")

    def sampling(self, offset: int = 0) -> Sampling:
        """The same for the sampler, with a seed of its own for each ``offset``."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed + offset)
