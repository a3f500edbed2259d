"""A self-contained HTML page of results: tables and pictures, no network, no scripts."""

import base64
import html
from pathlib import Path

from lmsleep.html_page import framed
from lmsleep.recipes.results import Result
from lmsleep.recipes.table import Lines


def result_section(result: Result, picture: Path, whose: str) -> str:
    """Return a result as HTML, its picture inside; `whose` it is stands in the heading."""
    # Inside the page, which can then be sent around as one file.
    data = base64.b64encode(picture.read_bytes()).decode()
    title, made_by = result.recipe.title, result.made_by.replace("`", "")
    seeds = "one seed" if result.seeds == 1 else f"{result.seeds} seeds"
    texts = [text for text in (result.recipe.caution, made_by) if text]
    lines = [
        f"<h2>{html.escape(f'{title} ({whose}, {seeds})')}</h2>",
        *(f"<p>{html.escape(text)}</p>" for text in texts),
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">',
        table(result.lines()),
    ]
    return "\n".join(lines)


def table(lines: Lines) -> str:
    """Return a table as HTML."""
    first, *rest = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
        for tag, line in zip(["th"] + ["td"] * (len(lines) - 1), lines, strict=True)
    )
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in (first, *rest)) + "</table>"


def page(sections: list[str]) -> str:
    """Return the whole page."""
    return framed("lmsleep demo", "\n".join(["<h1>What longer sleep buys</h1>", *sections]))
