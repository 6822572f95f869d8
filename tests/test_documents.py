"""What the documents say is so: the objectives, the lock file, links and commands, the citation."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lit_align import objectives
from lit_align.__main__ import SUBCOMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_objectives_is_what_their_docstrings_say() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from document_objectives import page
    finally:
        sys.path.remove(str(ROOT / "tools"))
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert text == page(), "run python tools/document_objectives.py"
    assert all(f"## {name}\n" in text for name in objectives.__all__)
    assert "| `beta` | 0.01 | β at the start, > 0. |" in text  # of ε-DPO


def test_the_lock_file_pins_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text
    assert not any("://" in line or " @ " in line for line in lines)


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "lit_align" / "py.typed").is_file()


def test_the_papers_are_cited() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    numbers = [one["identifiers"][0]["value"] for one in cited["references"]]
    assert numbers == ["arXiv:2402.00856", "arXiv:2405.00747", "arXiv:2502.13177", "arXiv:2404.14367"]
    assert all(one["authors"][0]["family-names"] for one in cited["references"])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_commands_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for command in re.findall(r"python -m lit_align (\w+)", text):
        assert command in SUBCOMMANDS, command
    for config in re.findall(r"--config (configs/[\w/.]+)", text):
        assert (ROOT / config).is_file(), config


def test_the_code_of_the_quick_start_compiles() -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "quickstart", "exec")


def test_the_lock_tool_names_what_it_pins() -> None:
    pytest.importorskip("gguf")  # pinned too, and no part of what tests need
    done = subprocess.run([sys.executable, str(ROOT / "tools/lock.py")], capture_output=True, text=True, check=True)
    assert re.search(r"^torch==[\d.]+$", done.stdout, re.MULTILINE)
