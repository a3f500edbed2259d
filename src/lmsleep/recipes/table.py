"""Tables of text: as Markdown or for a terminal, and their places in pages."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Lines = Sequence[Sequence[str]]  # the header and the rows


def as_markdown(lines: Lines) -> str:
    """Return the table as Markdown."""
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:])
    )


def as_text(lines: Lines) -> str:
    """Return the table with aligned columns, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def source(made: Mapping[str, Any]) -> str:
    """Say where a result was made: hardware, torch and commit, of `training.provenance`."""
    return f"{made['hardware']}, torch {made['torch']}, commit {made['commit']}"


def published(page: str, blocks: Mapping[str, str]) -> str:
    """Return `page` with every block `<!-- NAME -->...<!-- end -->` that `blocks` names made anew."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{blocks[name]}\n<!-- end -->" if name in blocks else match[0]

    # Not greedy, or the first block would reach to the end of the last one.
    return re.sub(r"<!-- ([\w.:-]+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)
