"""Imports point one way, and heavy libraries wait until they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lit_align"
FOUNDATION = {"batch", "errors", "assets", "protocols"}
ALLOWED = {
    "batch": set(),
    "protocols": {"batch"},
    "errors": set(),
    "assets": set(),
    "specials": FOUNDATION,
    "rewards": FOUNDATION | {"adapters", "models", "pair", "settings", "specials"},
    "slopes": FOUNDATION,
    "logprobs": FOUNDATION | {"slopes"},
    "attention": FOUNDATION,
    "layout": FOUNDATION | {"attention"},
    "baselines": FOUNDATION,
    "metrics": FOUNDATION,
    "returns": FOUNDATION,
    "snapshot": FOUNDATION,
    "freshness": FOUNDATION | {"metrics"},
    "monitor": FOUNDATION | {"freshness", "metrics"},
    "finite": FOUNDATION,
    "statefile": set(),
    "randomness": set(),
    "checkpoint": FOUNDATION | {"statefile"},
    "settings": FOUNDATION,
    "precision": FOUNDATION | {"settings"},
    "models": FOUNDATION | {"attention", "logprobs", "precision", "settings"},
    "lora": FOUNDATION,
    "adapters": FOUNDATION | {"lora", "settings"},
    "ledger": FOUNDATION,
    "rehearsal": FOUNDATION | {"ledger", "logprobs"},
    "planner": FOUNDATION | {"adapters", "layout", "ledger", "logprobs", "models", "rehearsal", "settings"},
    "logp_files": FOUNDATION,
    "caches": set(),
    "cache": FOUNDATION | {"adapters", "caches", "logp_files", "settings"},
    "kv_cache": set(),
    "decoding": FOUNDATION | {"kv_cache"},
    "generation": FOUNDATION | {"decoding", "logprobs"},
    "pair": FOUNDATION
    | {"adapters", "attention", "cache", "decoding", "generation", "kv_cache", "logprobs", "layout", "models"}
    | {"settings"},
    "draws": FOUNDATION | {"pair", "snapshot"},
    "checks": FOUNDATION,
    "contents": FOUNDATION | {"module"},
    "optimizer": FOUNDATION | {"settings"},
    "module": FOUNDATION
    | {"checks", "contents", "draws", "finite", "metrics", "monitor", "models", "optimizer", "pair", "settings"},
    "objectives": FOUNDATION
    | {"baselines", "checks", "metrics", "module", "objectives", "returns", "settings", "snapshot"},
    "data": FOUNDATION | {"caches", "data", "specials", "statefile"},
}
"""What each part may import from the package; a part that is not named, such as the command line, may import all."""

LAZY = ("transformers", "peft", "bitsandbytes", "datasets", "matplotlib", "vaderSentiment")


def imported(path: Path, *, everywhere: bool) -> set[str]:
    """Dotted names a file imports; only those outside functions and TYPE_CHECKING unless ``everywhere``."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or typing_only
        if everywhere or not lazy:
            waiting.extend(ast.iter_child_nodes(node))
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part not in ALLOWED:
        return
    names = {name.split(".")[1] for name in imported(path, everywhere=True) if name.startswith("lit_align.")}
    assert names <= ALLOWED[part], f"{part} may not import {sorted(names - ALLOWED[part])}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    names = {name.split(".")[0] for name in imported(path, everywhere=False)}
    assert not names & set(LAZY)


def test_defining_a_module_and_its_settings_loads_no_heavy_library_beyond_what_lightning_does() -> None:
    code = f"""
import sys
import lightning.pytorch, torchmetrics  # torchmetrics imports some of them itself
before = set(sys.modules)
import lit_align.objectives, lit_align.data
print(sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & set({LAZY!r})))
print([name for name in ("peft", "bitsandbytes", "transformers.modeling_utils") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
