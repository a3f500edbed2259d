"""What the documentation shows of the day on a GPU."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.gpu.part import Result
from benchmarks.gpu.plan import PARTS
from benchmarks.table import as_page
from lmsleep.files import write_atomic
from lmsleep.recipes.table import published

NOTHING = "No GPU has run this yet: `make gpu`."


def as_block(results: Mapping[str, Result]) -> str:
    """Return the results, by the names of their parts, as Markdown."""
    said = [_section(part.title, results[part.name]) for part in PARTS if results.get(part.name)]
    return "\n\n".join(said) or NOTHING


def publish(results: Mapping[str, Result], page: Path) -> None:
    """Write them into their block of a page."""
    text = page.read_text()
    if (new := published(text, {"benchmark:gpu": as_block(results)})) != text:
        write_atomic(page, new.encode())


def _section(title: str, result: Result) -> str:
    said = [f"### {title}"]
    said += [f"**Failed**: {result['error']}"] if "error" in result else []
    said += [f"Not all of it: {result['unfinished']}"] if "unfinished" in result else []
    said += [as_page(result)] if "rows" in result else []
    return "\n\n".join(said)
