"""One run: an ordinary command line of lit_align under a readable name, and the folder it writes."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

Options = Mapping[str, object]
"""Dotted keys of the configuration, without dashes, to their values."""

APART = 10_000
"""Between the seed of a run and that of its samples, which else may begin with the random numbers of its own draws."""
TRAINED = "trained"
"""Marks the folder of a reward model whose training came to its end: one that was stopped has an adapter as well."""


@dataclass(frozen=True)
class Trial:
    """A run of ``python -m lit_align fit``.

    Attributes:
        name: What it is, with slashes between the parts, such as "ppo/R1/0.001/seed 3".
        config: A YAML file of lit_align.
        options: Keys that differ from it.
        seed: Of everything: the adapter, the order of the data, the draws, the samples.
    """

    name: str
    config: Path
    options: Options = field(default_factory=dict)
    seed: int = 0

    @cached_property
    def key(self) -> str:
        """The name, and a hash of all settings, the text of the config among them."""
        settings = [self.config.read_text(encoding="utf-8"), sorted(map(str, self.options.items())), self.seed]
        return f"{self.name} {hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"

    def folder(self, root: Path) -> Path:
        """The run folder below a root."""
        return root / self.key.replace("/", "-").replace(" ", "_")

    def log(self, root: Path) -> Path:
        """The file beside it for what it prints."""
        folder = self.folder(root)
        return folder.with_name(f"{folder.name}.log")

    def arguments(self, folder: Path) -> list[str]:
        """The command line after ``python -m lit_align``; a seed that ``options`` sets stays as it is."""
        seeds = dict.fromkeys(("seed_everything", "data.seed", "samples.seed"), self.seed)
        given = {**seeds, **self.options, "run_dir": folder}
        return ["fit", "--config", str(self.config), *(f"--{key}={value}" for key, value in given.items())]

    def command(self, folder: Path) -> str:
        """What to type to see it alone; the studies' own rewards are found beside the studies."""
        path = shlex.quote(str(Path(__file__).parents[1]))
        return f"PYTHONPATH={path} python -m lit_align {shlex.join(self.arguments(folder))}"


def start_of(trial: Trial, folder: Path) -> list[str]:
    """The command line that begins a run, or goes on with it where it left a checkpoint; other remains are removed."""
    if any((folder / "checkpoints").glob("*.ckpt")):
        return [*trial.arguments(folder), "--resume"]
    shutil.rmtree(folder, ignore_errors=True)
    return trial.arguments(folder)
