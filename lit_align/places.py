"""Where a key or a mistake stands: which config file, which line."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path

import yaml

_started = Path()


def remember_folder() -> None:
    """Note where relative paths begin: while jsonargparse reads a file it stands in that file's folder."""
    global _started
    _started = Path.cwd()


def where(key: str, args: Sequence[str]) -> str:
    """``file.yaml:3: key`` if a config file sets the key, ``--key`` if the command line does, else the key."""
    if any(arg == f"--{key}" or arg.startswith((f"--{key}=", f"--{key}.")) for arg in args):
        return f"--{key}"
    for path in reversed(config_files(args)):
        if line := _line_of(key, path):
            return f"{path}:{line}: {key}"
    return f"--{key}"


def config_files(args: Sequence[str]) -> list[str]:
    """The files given by ``--config`` or ``-c``, in order."""
    files = [after for flag, after in itertools.pairwise(args) if flag in {"--config", "-c"}]
    return files + [arg.split("=", 1)[1] for arg in args if arg.startswith("--config=")]


def _line_of(key: str, path: str) -> int | None:
    """Line of a dotted key in a YAML file; ``init_args`` on the way does not count."""
    try:
        node = yaml.compose((_started / path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    line = None
    for part in key.split("."):
        entries = {k.value: (k, v) for k, v in getattr(node, "value", []) if isinstance(node, yaml.MappingNode)}
        if part not in entries and "init_args" in entries:
            node = entries["init_args"][1]
            entries = {k.value: (k, v) for k, v in node.value if isinstance(node, yaml.MappingNode)}
        if part not in entries:
            return None
        name, node = entries[part]
        line = name.start_mark.line + 1
    return line


def unreadable(args: Sequence[str]) -> str | None:
    """Which config file cannot be read, and where; None if all can."""
    for path in config_files(args):
        try:
            yaml.compose((_started / path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            return f"{path}: byte {error.start} is not UTF-8"
        except OSError as error:
            return f"--config {path}: {error.strerror}; {_similar_files(path)}"
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            return f"{path}{line}: not YAML: {error.problem}"
    return None


def _similar_files(path: str) -> str:
    near = sorted([*(_started / "configs").rglob("*.yaml"), *(_started / path).parent.glob("*.yaml")])
    found = [str(file.relative_to(_started) if file.is_relative_to(_started) else file) for file in near]
    return nearest(path, list(dict.fromkeys(found)), "YAML files here: ") if found else "there are no YAML files here"


def nearest(word: str, known: Sequence[str], otherwise: str) -> str:
    """Name the likeliest of the known words; if none is near, all of them, or what comes before a bar."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    near = near or [name for name in known if name.lower() == word.lower()][:1]
    if near:
        return f"did you mean {near[0]}?"
    return otherwise[:-1] if otherwise.endswith("|") else otherwise + ", ".join(known)
