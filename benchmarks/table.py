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
    """Return header and rows in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(map(_text, row.values())) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell or ""


def as_text(result: Mapping[str, Any]) -> str:
    """Return note, table and what made it as plain text."""
    made = result["made_by"]
    source = f"`{made['command']}`, {made['hardware']}, torch {made['torch']}, commit {made['commit']}"
    return f"{result['note']}\n\n{as_markdown(result['rows'])}\n\n{source}\n"


def with_tables(page: str, name: str, results: Mapping[str, Any]) -> str:
    """`page` with each block `<!-- benchmark:NAME.TABLE -->...<!-- end -->` that `results` has made anew."""

    def block(match: re.Match[str]) -> str:
        table = match.group(1)
        if table not in results:
            return match.group()
        return f"<!-- benchmark:{name}.{table} -->\n{as_text(results[table])}<!-- end -->"

    return re.sub(rf"<!-- benchmark:{name}\.([\w-]+) -->.*?<!-- end -->", block, page, flags=re.DOTALL)
