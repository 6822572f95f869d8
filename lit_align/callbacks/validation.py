"""What ``validate`` says: the data report and the metrics, where Lightning would print a raw table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def validation_table(metrics: Mapping[str, Any], source: str) -> Table:
    """The held-out metrics, by name.

    Args:
        metrics: Logged name -> value; those that do not begin with ``val/`` are left out.
        source: What was validated, for the title.
    """
    table = Table(title=source)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in sorted(metrics.items()):
        if name.startswith("val/"):
            table.add_row(name, f"{float(value):.5g}")
    return table
