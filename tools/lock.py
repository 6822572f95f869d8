"""Write what a development environment resolved to: every package that lit_align and its extras lead to, pinned.

    .venv/bin/python tools/lock.py > requirements.lock

Read are pyproject.toml and the metadata of the environment it runs in; nothing is downloaded. A local build tag of a
version, such as +cpu, is left off.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXTRAS = ("dev", "gguf")
"""Extras of pyproject.toml that a development environment has."""


def closure(wanted: Iterable[str]) -> dict[str, str]:
    """Name and version of each package the requirements lead to in this environment.

    Args:
        wanted: Requirements as pyproject.toml writes them.

    Raises:
        PackageNotFoundError: If one of them is not installed.
    """
    found: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in wanted]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        package = distribution(requirement.name)
        found[name] = Version(package.version).public
        for extra in {"", *requirement.extras}:
            if (name, extra) in done:
                continue
            done.add((name, extra))
            further = map(Requirement, package.requires or [])
            waiting += [one for one in further if not one.marker or one.marker.evaluate({"extra": extra})]
    return found


def main() -> int:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [one for extra in EXTRAS for one in project["optional-dependencies"][extra]]
    try:
        pinned = closure(wanted)
    except PackageNotFoundError as error:
        print(f"error: {error}; run this in an environment with lit_align[{','.join(EXTRAS)}]", file=sys.stderr)
        return 2
    print(
        f"# lit_align[{','.join(EXTRAS)}] under Python {sys.version_info.major}.{sys.version_info.minor}; tools/lock.py"
    )
    print("\n".join(f"{name}=={version}" for name, version in sorted(pinned.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
