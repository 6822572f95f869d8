"""Pictures of a study's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Picture:
    """Panels side by side, saved as one PNG.

    Args:
        titles: Of the panels.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(4 * len(titles), 3.2), layout="constrained")
        FigureCanvasAgg(self.figure)
        self.panels = [self.figure.add_subplot(1, len(titles), i + 1, title=title) for i, title in enumerate(titles)]
        self.drawn = [0] * len(titles)

    def line(self, panel: int, label: str, curve: Mapping[str, Sequence[float]] | None, x: str, y: str) -> None:
        """Add a curve over seeds, with its standard error as a band; nothing where it has not been run."""
        if curve is None or x not in curve or y not in curve:
            return
        axes = self.panels[panel]
        (drawn,) = axes.plot(curve[x], curve[y], ".-", markersize=3, label=label)
        pairs = list(zip(curve[y], curve.get(f"{y} error", []), strict=False))
        if pairs and None not in (error for _, error in pairs):
            low, high = [v - e for v, e in pairs], [v + e for v, e in pairs]
            axes.fill_between(curve[x], low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
        self.drawn[panel] += 1

    def points(self, panel: int, label: str, places: Sequence[float], values: Sequence[Mapping[str, Any]]) -> None:
        """Add means with error bars."""
        if values:
            errors = [value["standard_error"] or 0.0 for value in values]
            means = [value["mean"] for value in values]
            self.panels[panel].errorbar(places, means, errors, fmt="o-", markersize=3, capsize=2, label=label)
            self.drawn[panel] += 1

    def save(self, path: Path, x: str, y: str) -> None:
        """Write the PNG, unless nothing was drawn."""
        if not any(self.drawn):
            return
        for axes, drawn in zip(self.panels, self.drawn, strict=True):
            axes.set_xlabel(x)
            axes.grid(alpha=0.3)
            if drawn:
                axes.legend(fontsize=7)
        self.panels[0].set_ylabel(y)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path, dpi=90)
