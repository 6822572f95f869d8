"""Several runs side by side: a table of where each ended, and pictures of how it got there.

Read are config.yaml, metrics.csv and samples.json of each run folder; nothing is loaded or drawn anew. The reward and
the KL are those of the samples drawn during training, from the same prompts for runs on the same data.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from lit_align.commands.arguments import parse
from lit_align.commands.screen import wide_console
from lit_align.errors import UserError

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Compare:
    """What is compared.

    Attributes:
        runs: Two or more run folders.
        out: Folder for the pictures; it is made if need be, and pictures in it are written over.
    """

    runs: list[str]
    out: str = "comparison"


@dataclass(frozen=True)
class History:
    """What a run folder tells.

    Attributes:
        name: Shortest part of the path that tells the runs apart.
        config: The run's configuration.
        logged: Logged name -> (optimizer step, value) in order.
        draws: The summaries of ``samples.json``, the first from the reference; empty where nothing was sampled.
    """

    name: str
    config: dict[str, Any]
    logged: dict[str, Points]
    draws: list[dict[str, Any]]

    @property
    def objective(self) -> str:
        """Class name of the objective."""
        return str(self.config["model"]["class_path"]).rsplit(".", 1)[-1]

    def last(self, name: str) -> float | None:
        """The last logged value of a name, in validation if it is there."""
        points = self.logged.get(f"val/{name}") or self.logged.get(f"train/{name}")
        return points[-1][1] if points else None

    def drawn(self, name: str) -> Points:
        """A quantity of the samples over optimizer steps; the reference's KL to itself is 0."""
        found: Points = []
        for index, one in enumerate(self.draws):
            value = one.get(name, 0.0 if name == "kl" and index == 0 else None)
            value = value["mean"] if isinstance(value, dict) else value
            if value is not None:
                found.append((one["step"], value))
        return found


def run(args: Sequence[str]) -> None:
    """Print the table and write the pictures."""
    (options,) = parse("compare", args, __doc__, Compare)
    if len(options.runs) < 2:
        raise UserError("give two or more run folders to compare")
    histories = [read(Path(path), name) for path, name in zip(options.runs, names(options.runs), strict=True)]
    wide_console().print(table(histories))
    written = draw_pictures(histories, Path(options.out))
    print("pictures: " + ", ".join(map(str, written)) if written else "there is nothing to draw")


def names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a path given twice is numbered."""
    parts = [Path(path).expanduser().resolve().parts for path in paths]
    length = next((n for n in range(1, max(map(len, parts))) if len({one[-n:] for one in parts}) == len(parts)), 1)
    found = ["/".join(one[-length:]) for one in parts]
    seen: Counter[str] = Counter()
    for index, name in enumerate(found):
        seen[name] += 1
        found[index] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return found


def read(folder: Path, name: str) -> History:
    """What a run folder holds.

    Raises:
        UserError: If it is none, or broken, with the file.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it holds no config.yaml")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        place = folder / "samples.json"
        draws = json.loads(place.read_text(encoding="utf-8"))["draws"] if place.is_file() else []
        return History(name, config, read_metrics(folder / "metrics.csv"), draws)
    except (ValueError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: a file of the run cannot be read ({type(error).__name__}: {error})") from error


def read_metrics(path: Path) -> dict[str, Points]:
    """The columns of ``metrics.csv``; without the file nothing.

    Lightning counts steps from 0, so a value logged after step n stands at n - 1.
    """
    found: dict[str, Points] = {}
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]  # no half row at the end
        for row in rows:
            step = float(row.pop("step")) + 1
            for name, value in row.items():
                if value and name != "epoch":
                    found.setdefault(name, []).append((step, float(value)))
    return found


def table(histories: Sequence[History]) -> Table:
    """Where each run ended; the reward and the length also where it began."""
    columns = ["run", "objective", "steps", "reward", "KL, nats", "accuracy", "margin", "β", "tokens", "ended"]
    grid = Table(title="samples: before → after, mean ± standard error over prompts; the rest is the last value logged")
    for column in columns:
        grid.add_column(column, justify="left" if column in columns[:2] else "right", overflow="fold")
    for one in histories:
        beta = one.logged.get("train/beta", [])
        ends = list(dict.fromkeys(f"{points[1]:.4g}" for points in (beta[0], beta[-1]))) if beta else []
        grid.add_row(
            one.name,
            one.objective,
            str(max((int(points[-1][0]) for points in one.logged.values()), default=0)),
            _before_and_after(one, "reward", ".3f"),
            _estimate(one.draws[-1].get("kl"), ".2f") if one.draws else "–",
            _number(one.last("rewards/accuracies")),
            _number(one.last("rewards/margins")),
            " → ".join(ends) or _number(_constant(one, "beta")),
            _before_and_after(one, "tokens", ".1f"),
            _before_and_after(one, "ended", ".0%"),
        )
    return grid


def _constant(one: History, name: str) -> float | None:
    value = (one.config["model"].get("init_args") or {}).get(name)
    return float(value) if isinstance(value, int | float) else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _before_and_after(one: History, name: str, style: str) -> str:
    if not one.draws or name not in one.draws[-1]:
        return "–"
    return " → ".join(_estimate(draw[name], style) for draw in (one.draws[0], one.draws[-1]))


def _estimate(value: Any, style: str) -> str:
    if value is None:
        return "–"
    if not isinstance(value, dict):
        return f"{value:{style}}"
    error = value["standard_error"]
    return f"{value['mean']:{style}}" + ("" if error is None else f" ± {error:{style}}")


def draw_pictures(histories: Sequence[History], out: Path) -> list[Path]:
    """Write one picture for each quantity that any of the runs has.

    Returns:
        The files: ``reward_kl.png`` (reward against KL, a point for each draw), ``margins.png``, ``beta.png``,
        ``lengths.png``.
    """
    step = "optimizer step"
    frontier = {
        one.name: [(kl, reward) for (_, kl), (_, reward) in zip(one.drawn("kl"), one.drawn("reward"), strict=False)]
        for one in histories
    }
    margins = {one.name: one.logged.get("val/rewards/margins", []) for one in histories}
    if not all(len(points) > 1 for points in margins.values()):
        margins = {one.name: one.logged.get("train/rewards/margins", []) for one in histories}
    wanted = {
        "reward_kl.png": (frontier, "KL(policy ‖ reference), nats", "reward of samples"),
        "margins.png": (margins, step, "reward margin"),
        "beta.png": ({one.name: one.logged.get("train/beta", []) for one in histories}, step, "β"),
        "lengths.png": ({one.name: one.drawn("tokens") for one in histories}, step, "tokens of samples"),
    }
    return [out / name for name, picture in wanted.items() if draw_lines(*picture, out / name)]


def draw_lines(lines: dict[str, Points], across: str, up: str, path: Path) -> bool:
    """Draw one line with points for each run.

    Args:
        lines: Name of the run -> its points.
        across: What the horizontal axis shows.
        up: What the vertical axis shows.
        path: The PNG file.

    Returns:
        Whether there was anything to draw.
    """
    kept = {name: points for name, points in lines.items() if points}
    if not kept:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in kept.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4 if len(points) < 30 else 0, label=name)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True
