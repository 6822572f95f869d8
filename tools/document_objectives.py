"""Write docs/objectives.md from the docstrings of the objectives: their equations, arguments and defaults.

    python tools/document_objectives.py

The docstrings are the source; a test compares the page with them.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from lit_align import objectives
from lit_align.module import AlignModule
from lit_align.settings import LoraSettings, OptimSettings, PairSettings

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"
HEAD = """# Objectives

Written from the docstrings by `tools/document_objectives.py`. The README's table says which data each needs and which
YAML sets it up; [docs/architecture.md](architecture.md) says how losses are reduced, and
[CONTRIBUTING.md](../CONTRIBUTING.md) how to add one.

Symbols: M = log π_θ(y|x) - log π_ref(y|x) is a completion's log-ratio in nats, summed over its tokens, end of sequence
included; w and l are the better and the worse completion of a pair, m = M_w - M_l; K completions of a prompt are scored
together; |y| counts tokens.

Every objective has the arguments of its section as `model.NAME`, and these:
"""
SHARED = {"model.pair": PairSettings, "model.pair.lora": LoraSettings, "model.optim": OptimSettings}
RATE = """A `learning_rate` that is left out follows the base: 5e-4 up to 40 million parameters, 1.4e-4 for half a
billion and 1e-4 from one billion on, the same for every objective. What decides about the data is in
[data.md](data.md), about memory in [one_gpu.md](one_gpu.md); `python -m lit_align fit --help` has the rest.
"""


def page() -> str:
    """The whole page."""
    classes = [getattr(objectives, name) for name in sorted(objectives.__all__, key=str.lower)]
    return "\n".join([HEAD, *(shared(key, cls) for key, cls in SHARED.items()), RATE, *map(section, classes)])


def shared(key: str, cls: type) -> str:
    """What all objectives have below one key."""
    signature, arguments = inspect.signature(cls).parameters, split(cls)[1]
    rows = [f"| `{name}` | {shown(signature[name].default)} | {text} |" for name, text in arguments.items()]
    rows = [row for row in rows if not row.startswith("| `lora` |")]
    return "\n".join([f"| `{key}` | default | |", "|---|---|---|", *rows, ""])


def section(cls: type[AlignModule]) -> str:
    """An objective: what it is, its arguments, and the equations of its file."""
    about, arguments = split(cls)
    signature = inspect.signature(cls).parameters
    rows = [
        f"| `{name}` | {shown(signature[name].default)} | {text} |"
        for name, text in arguments.items()
        if name not in {"pair", "optim"}
    ]
    table = ["", "| argument | default | |", "|---|---|---|", *rows] if rows else []
    module = sys.modules[cls.__module__]
    return "\n".join([f"## {cls.__name__}", "", about, *table, *equations(module), ""])


def split(cls: type) -> tuple[str, dict[str, str]]:
    """The docstring of a class without its sections, and what it says of each argument."""
    text = inspect.getdoc(cls) or ""
    about = re.split(r"\n\n(?:Args|Raises|Attributes):\n", text)[0]
    listed = re.search(r"\n\n(?:Args|Attributes):\n((?:    .*\n?)+)", text)
    arguments = dict(re.findall(r"^    (\w+): ((?:.*\n?(?:^     +.*\n?)*))", listed[1] if listed else "", re.MULTILINE))
    bodies = {name: " ".join(line.strip() for line in body.splitlines()) for name, body in arguments.items()}
    return about, {name: body.replace("``", "`") for name, body in bodies.items()}


def shown(default: object) -> str:
    """A default as a YAML would have it; "" where there is none."""
    if default is inspect.Parameter.empty:
        return ""
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def equations(module: ModuleType) -> Iterator[str]:
    """The indented lines of the docstrings of a file's functions, with their sources."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__ and not name.startswith("_"):
            text = re.split(r"\n\n(?:Args|Returns|Raises):\n", inspect.getdoc(function) or "")[0]
            if found := re.findall(r"^    .*\S.*$", text, re.MULTILINE):
                yield from ("", f"`{name}`: {text.splitlines()[0]}", "", "```text")
                yield from (line.removeprefix("    ") for line in found)
                yield "```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")
