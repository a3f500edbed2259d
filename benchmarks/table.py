"""A measured table: rows of named cells, and how they read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmsleep.evaluation import wilson
from lmsleep.recipes.table import as_markdown, source

Cell = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of a benchmark."""

    rows: list[dict[str, Cell]]
    """Cells by the name of their column, the same columns in every row."""
    note: str
    """What was measured, and how."""


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell or ""


def share(right: int, asked: int) -> str:
    """Write the share of right answers with its 95 % interval (Wilson)."""
    low, high = wilson(right, asked)
    return f"{right / asked:.2f} [{low:.2f}, {high:.2f}]"


def as_page(result: Mapping[str, Any]) -> str:
    """Return the note, the table and what made it, as Markdown."""
    rows = result["rows"]
    lines = as_markdown([[*rows[0]], *([_text(cell) for cell in row.values()] for row in rows)])
    made = result["made_by"]
    return f"{result['note']}\n\n{lines}\n\n`{made['command']}`, {source(made)}"
