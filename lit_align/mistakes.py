"""Errors in the user's words: what a failed parse or a refused value means, where it is, what was meant."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_align.errors import UserError
from lit_align.places import nearest, unreadable, where

PACKAGE = Path(__file__).parent
BASES = {"model": "lit_align.module.AlignModule", "data": "lightning.pytorch.LightningDataModule"}
"""The class that ``model`` and ``data`` accept."""
KINDS = BASES | {
    "trainer.callbacks": "lightning.pytorch.Callback",
    "trainer.logger": "lightning.pytorch.loggers.logger.Logger",
}
"""The class that each key accepts."""

SAME_PLACE, ELSEWHERE = 0.6, 0.8
"""From which likeness on one word may be meant by another, beside it and further away."""


def for_the_user(error: BaseException) -> str | None:
    """The message of an error that the user can put right, or None for a defect that needs its traceback.

    Besides ``UserError`` these are refusals by Lightning (its own misconfiguration exception), a full GPU, and value
    and file errors raised by this package itself, not by a library it calls.
    """
    if (own := user_error_in(error)) is not None:
        return str(own)
    import torch
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    if isinstance(error, MisconfigurationException):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU is out of memory. Lower --data.batch_size (and raise --trainer.accumulate_grad_batches as much) "
            "or --data.max_length, set --model.pair.gradient_checkpointing true or --model.pair.quantization nf4, or "
            f"start from --config configs/hardware/gpu_24gb.yaml\n({str(error).splitlines()[0]})"
        )
    if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError | PermissionError):
        frames = traceback.extract_tb(error.__traceback__)
        if frames and PACKAGE in Path(frames[-1].filename).parents:
            return str(error)
    return None


def user_error_in(error: BaseException | None) -> UserError | None:
    """The ``UserError`` that an error is or was raised from; jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def explain(message: str, args: Sequence[str], parser_keys: Iterable[str]) -> str:
    """Put a message of jsonargparse into one or two lines.

    Args:
        message: What jsonargparse says.
        args: The command line, to find where the key was given.
        parser_keys: The keys the parser knows, dotted, those below ``model`` and ``data`` aside.
    """
    if "Problems parsing config" in message or 'Parser key "config"' in message:
        return unreadable(args) or _shortened(message)
    place = [key for key in re.findall(r'Parser key "([\w.]+)"', message) if key != "config"]
    chosen = re.search(r"given class_path '([\w.]+)'", message)
    root = place[0] if place else ""
    if place[-1:] == ["reward"]:
        return _reward(message)
    if option := _unknown_key(message):
        key = ".".join([*place, option]) if root in BASES else option
        return _unknown_option(key, chosen[1] if chosen else "", args, parser_keys)
    if "the following arguments are required" in message:
        return _missing(message)
    if root in KINDS and (named := _class_name(message)):
        return f"{where(root, args)}: {named!r} is no class for it; {nearest(named, class_names(root), 'known are ')}"
    if "class, but" in message and "is abstract" in message:
        return f"--{root} is missing: name a class first, such as --{root} {class_names(root)[0]}"
    if value := re.search(r"Expected an? (.+?)\.? Got value: (.*)", message):
        kind = re.sub(r"<class '([\w.]+)'>", r"of type \1", value[1])
        kind = re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind)
        return f"{where('.'.join(place), args)} is {value[2].strip()!r}; it must be {kind}"
    return _shortened(message)


def _unknown_key(message: str) -> str | None:
    """The key that a message refuses, or None if it is about something else."""
    patterns = [
        r"Group '([\w.]+)' does not accept option '([\w.]+)'",
        r"Subcommand '\w+' does not accept option '([\w.]+)'",
        r"Option '([\w.]+)' is not accepted",
        r"unrecognized arguments: (?:--)?([^\s=]+)",
        r"unexpected keyword argument '(\w+)'",
    ]
    for pattern in patterns:
        if found := re.search(pattern, message):
            return ".".join(found.groups())
    return None


def _unknown_option(key: str, class_path: str, args: Sequence[str], parser_keys: Iterable[str]) -> str:
    known = [name for name in parser_keys if name.split(".")[0] not in BASES] + list(BASES)
    root = key.split(".")[0]
    if root in BASES and class_path:
        known = [f"{root}.{name}" for name in ("class_path", "init_args", *argument_names(class_named(class_path)))]
    owner = f" of {class_path.rsplit('.', 1)[-1]}" if class_path else ""
    branches = {name.rsplit(".", i)[0] for name in known for i in range(1, name.count(".") + 1)}
    alike = [name for name in (*known, *branches) if _alike(name, key)]
    hint = nearest(key, alike, "see --help, or the options of a class by --model.help NAME" + "|")
    return f"{where(key, args)} is no option{owner}; {hint}"


def _alike(name: str, key: str) -> bool:
    """Whether the last parts of two dotted names are alike; under another beginning they must be more so."""
    (first, last), (other, word) = (one.lower().rpartition(".")[::2] for one in (name, key))
    likeness = difflib.SequenceMatcher(None, last, word).ratio()
    return likeness > (SAME_PLACE if first == other else ELSEWHERE)


def _reward(message: str) -> str:
    """What was given as a reward, and what may be."""
    given = re.search(r"Given value: ((?!NestedArg)[\w.]+)", message)
    cause = re.search(r"(No module named .*|module '.*' has no attribute '.*')", message)
    said = f" ({cause[1].strip()})" if cause else ""
    name = repr(given[1]) if given else "this"
    return (
        f"--data.reward: {name} names no reward{said}; give the dotted name of a function "
        "from prompts and completions to numbers, such as my_rewards.score, or of a class with its arguments: "
        "lit_align.rewards.TrainedReward, lit_align.rewards.Length or lit_align.rewards.Vader"
    )


def _class_name(message: str) -> str | None:
    found = re.search(r"Expected a dot import path string: (\S+)", message)
    found = found or re.search(r"given class_path '([\w.]+)':\s+(?:module|No module|Import|Unexpected import)", message)
    found = found or re.search(r"Import path '?([\w.]+)'? (?:does not|is not)", message)
    return found[1] if found else None


def _missing(message: str) -> str:
    names = [key.split(".")[-1] for key in message.split(":", 1)[1].replace(",", " ").split()]
    parts = [f"--{name} (one of {', '.join(class_names(name))})" if name in BASES else f"--{name}" for name in names]
    return f"missing: {', '.join(parts)}. A config file sets both model and data: --config configs/OBJECTIVE.yaml"


def _shortened(message: str, lines: int = 6) -> str:
    """A message nobody here recognizes: its lines without the boilerplate about types."""
    dull = r"^\s*(- Expected a <class 'NoneType'>|Does not validate|Subtypes:|Errors:|Given value type:)"
    kept = [line.strip() for line in message.splitlines() if line.strip() and not re.match(dull, line)]
    return "\n  ".join(kept[:lines])


def class_names(key: str) -> list[str]:
    """Names of the classes that can be given for one of ``KINDS``, those of this package first."""
    base: type = class_named(KINDS[key])
    found = {cls.__name__: cls.__module__ for cls in subclasses(base)}
    names = [name for name, module in found.items() if key not in BASES or not module.startswith("lightning.")]
    return sorted(names, key=lambda name: (not found[name].startswith("lit_align."), name))


def subclasses(base: type) -> Iterator[type]:
    """All concrete classes below ``base`` that have been imported."""
    direct: list[type] = base.__subclasses__()
    for cls in direct:
        if not inspect.isabstract(cls):
            yield cls
        yield from subclasses(cls)


def argument_names(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of the arguments of a class and of the dataclasses among them, such as ``pair.lora.r``."""
    hints = typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)  # type: ignore[misc]
    for name, hint in hints.items():
        if name == "return":
            continue
        yield prefix + name
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for option in options:
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                yield from argument_names(option, f"{prefix}{name}.")


def class_named(path: str) -> Any:
    """What a dotted path names."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)
