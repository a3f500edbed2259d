"""A measured table: rows of named cells, as JSON or Markdown, and its place in the documentation."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of a benchmark."""

    rows: list[dict[str, Cell]]
    """Cells by the name of their column, the same columns in every row."""
    note: str
    """What was measured, and how."""


def as_markdown(rows: list[dict[str, Cell]]) -> str:
    """Header and rows."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(map(_text, row.values())) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell or ""


def source(result: Mapping[str, Any]) -> str:
    """What made a result, in one line."""
    made = result["made_by"]
    return f"`{made['command']}`, {made['hardware']}, torch {made['torch']}, commit {made['commit']}"


def with_tables(page: str, name: str, result: Mapping[str, Any]) -> str:
    """`page` with every block `<!-- benchmark:NAME.TABLE -->...<!-- end -->` made anew from `result`."""

    def block(match: re.Match[str]) -> str:
        table = result["tables"][match.group(1)]
        body = f"{table['note']}\n\n{as_markdown(table['rows'])}\n\n{source(result)}"
        return f"<!-- benchmark:{name}.{match.group(1)} -->\n{body}\n<!-- end -->"

    return re.sub(rf"<!-- benchmark:{name}\.([\w-]+) -->.*?<!-- end -->", block, page, flags=re.DOTALL)
