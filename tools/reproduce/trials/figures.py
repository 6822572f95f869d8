"""Pictures of a study's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = 5
"""Of a legend below the panels."""
BESIDE = 4
"""Most panels in one row; more of them stand in rows of three."""


class Picture:
    """Panels in one row or in rows of three, saved as one PNG; what has the same name in two has the same colour.

    Args:
        titles: Of the panels.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.columns = len(titles) if len(titles) <= BESIDE else 3
        rows = -(-len(titles) // self.columns)
        self.figure = Figure(figsize=(4 * self.columns, 3.2 * rows), layout="constrained")
        FigureCanvasAgg(self.figure)
        places = [(rows, self.columns, i + 1) for i in range(len(titles))]
        self.panels = [self.figure.add_subplot(*at, title=title) for at, title in zip(places, titles, strict=True)]
        self.labels: list[list[str]] = [[] for _ in titles]
        self.colors: dict[str, str] = {}

    def line(self, panel: int, label: str, curve: Mapping[str, Sequence[float]] | None, x: str, y: str) -> None:
        """Add a curve over seeds, with its standard error as a band; nothing where it has not been run."""
        if curve is None or x not in curve or y not in curve:
            return
        axes = self.panels[panel]
        color = self._color(panel, label)
        axes.plot(curve[x], curve[y], ".-", markersize=3, label=label, color=color)
        pairs = list(zip(curve[y], curve.get(f"{y} error", []), strict=False))
        if pairs and None not in (error for _, error in pairs):
            low, high = [v - e for v, e in pairs], [v + e for v, e in pairs]
            axes.fill_between(curve[x], low, high, color=color, alpha=0.2, linewidth=0)

    def points(self, panel: int, label: str, places: Sequence[float], values: Sequence[Mapping[str, Any]]) -> None:
        """Add means with error bars."""
        if values:
            errors = [value["standard_error"] or 0.0 for value in values]
            means = [value["mean"] for value in values]
            style = {"fmt": "o-", "markersize": 3, "capsize": 2, "color": self._color(panel, label)}
            self.panels[panel].errorbar(places, means, errors, label=label, **style)

    def save(self, path: Path, x: str | Sequence[str], y: str | Sequence[str]) -> None:
        """Write the PNG, unless nothing was drawn.

        Args:
            path: The file.
            x: Name of the horizontal axes, or one for each panel.
            y: Name of the first vertical axis of each row, or one for each panel.
        """
        if not self.colors:
            return
        below = [x] * len(self.panels) if isinstance(x, str) else x
        beside = ["" if i % self.columns else y for i in range(len(self.panels))] if isinstance(y, str) else y
        for axes, name, other in zip(self.panels, below, beside, strict=True):
            axes.set_xlabel(name)
            axes.set_ylabel(other)
            axes.grid(alpha=0.3)
        self._legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path, dpi=90)

    def _color(self, panel: int, label: str) -> str:
        self.labels[panel].append(label)
        return self.colors.setdefault(label, f"C{len(self.colors) % 10}")

    def _legend(self) -> None:
        """One below the panels, where it hides nothing, if a panel has all the names; else one in each."""
        fullest = max(self.panels, key=lambda axes: len(self.labels[self.panels.index(axes)]))
        names = set(self.labels[self.panels.index(fullest)])
        if len(self.panels) > 1 and set(self.colors) == names:
            rows = -(-len(names) // COLUMNS)
            self.figure.set_figheight(self.figure.get_figheight() + 0.2 * rows)
            handles = fullest.get_legend_handles_labels()
            self.figure.legend(*handles, loc="outside lower center", ncols=COLUMNS, fontsize=7)
            return
        for axes, drawn in zip(self.panels, self.labels, strict=True):
            if drawn:
                axes.legend(fontsize=7)
