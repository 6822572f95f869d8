"""The command line's parser: short errors, and one objective in the place of another.

A change of objective keeps what all objectives share, the arguments of ``AlignModule``, and drops the rest: a ``beta``
that was chosen for one objective says nothing about another.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import Namespace, _postponed_annotations, _typehints, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from lit_align.errors import UserError
from lit_align.mistakes import explain, user_error_in
from lit_align.module import AlignModule

PLUGINS = ("lit_align.objectives", "lit_align.data")
"""Packages whose classes are known by their short names; each file in them is imported."""

SHARED = frozenset(inspect.signature(AlignModule).parameters)
"""Arguments that every objective has."""

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


def register() -> None:
    """Import every module of the plugin packages, so that their classes can be named without a path."""
    for name in PLUGINS:
        package = importlib.import_module(name)
        for found in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{name}.{found.name}")


class AlignParser(LightningArgumentParser):
    """LightningCLI's parser with errors of a line or two instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message in the user's words.

        Raises:
            UserError: Always, except in parsers of nested values, whose errors jsonargparse itself puts together.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        if (own := user_error_in(ex)) is not None:
            raise own
        parser = getattr(ex, "subcommand_parser", None) or self
        keys = [str(action.dest) for action in parser._actions]
        raise UserError(explain(message, getattr(self, "args", []), keys)) from ex


def classes_first(args: Sequence[str]) -> list[str]:
    """Move ``--model X`` and ``--data X`` before the values they take, so that the order of flags does not matter.

    Only flags after the last ``--config`` move: a config file still overrides what stands before it.
    """
    given = list(args)
    start = max((i + 2 for i, arg in enumerate(given) if arg in {"--config", "-c"}), default=1)
    start = max([start, *(i + 1 for i, arg in enumerate(given) if arg.startswith("--config="))])
    chosen: list[str] = []
    rest: list[str] = []
    tail = iter(given[start:])
    for arg in tail:
        if arg in {"--model", "--data"}:
            chosen += [arg, *[value for value in [next(tail, None)] if value is not None]]
        elif arg.startswith(("--model=", "--data=")):
            chosen.append(arg)
        else:
            rest.append(arg)
    return given[:start] + chosen + rest


@contextmanager
def own_rules() -> Iterator[None]:
    """Within this context jsonargparse follows two rules of ours, for which it offers no hook.

    A change of objective drops the arguments of the old one that are not shared; by itself it keeps every argument
    whose name the new class also has. And the ``TYPE_CHECKING`` blocks of this package stay unread: it would run them
    to look for types, and import transformers. The functions replaced are private to it, so tests watch the behaviour.
    """
    hints: Any = _typehints
    visitor_class: Any = _postponed_annotations.TypeCheckingVisitor
    keep, read = hints.discard_init_args_on_class_path_change, visitor_class.visit_If

    def discard(parser_or_action: Any, previous: Any, value: Any) -> None:
        if _is_other_objective(previous, value):
            arguments = previous["init_args"]
            for name in [name for name in vars(arguments) if name not in SHARED]:
                arguments.pop(name)
        keep(parser_or_action, previous, value)

    def visit(visitor: Any, node: Any) -> None:
        if not visitor.module.startswith("lit_align."):
            read(visitor, node)

    hints.discard_init_args_on_class_path_change, visitor_class.visit_If = discard, visit
    try:
        yield
    finally:
        hints.discard_init_args_on_class_path_change, visitor_class.visit_If = keep, read


def _is_other_objective(previous: Any, value: Any) -> bool:
    if not (isinstance(previous, Namespace) and previous.get("init_args") and previous.get("class_path")):
        return False
    return previous["class_path"] != value["class_path"] and _is_objective(previous["class_path"])


def _is_objective(path: str) -> bool:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module else None
    return isinstance(found, type) and issubclass(found, AlignModule)
