"""The demo's results in words: the table, and the page around the picture."""

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmsleep.evaluation import mean_interval, wilson
from lmsleep.html_page import framed

Row = dict[str, Any]


def table(result: dict[str, Any], task: str) -> list[list[str]]:
    """Header and rows: mean accuracy over seeds with its 95 % interval, per difficulty and in all.

    One block of rows at equal training tokens, one at equal training compute, then the floors.
    """
    part = result[task]
    keys = list(part["rows"][0]["eval"]["per_difficulty"])
    header = ["at equal", "model", "steps", "s", *(f"{part['difficulty']}={k}" for k in keys)]
    if len(keys) > 1:
        header.append("all")
    lines = [header]
    for budget in ("tokens", "compute"):
        rows = [r for r in part["rows"] if r["budget"] in (budget, "both")]
        for label in sorted({r["label"] for r in rows}):
            mine = [r for r in rows if r["label"] == label]
            cells = [
                _cell([(r["eval"]["per_difficulty"][k], r["eval"]["answers"][k]) for r in mine]) for k in keys
            ]
            if len(keys) > 1:
                cells.append(
                    _cell([(r["eval"]["accuracy"], sum(r["eval"]["answers"].values())) for r in mine])
                )
            seconds = sum(r["seconds"] for r in mine) / len(mine)
            lines.append([budget, label, str(mine[0]["step"]), f"{seconds:.0f}", *cells])
    for name, value in part["floors"].items():
        lines.append(["", {"chance": "chance", "constant": "best constant answer"}[name], "", ""]
                     + [f"{value:.3f}"] * (len(header) - 4))  # fmt: skip
    return lines


def _cell(scores: list[tuple[float, int]]) -> str:
    """From (accuracy, answers) per seed: the mean with its interval over seeds, if there are enough.

    Two seeds are shown as they are, for an interval of two says nothing; one seed with the interval of
    its own sample (Wilson).
    """
    if len(scores) == 2:
        return f"{scores[0][0]:.3f} {scores[1][0]:.3f}"
    mean, low, high = mean_interval(accuracy for accuracy, _ in scores)
    if len(scores) == 1:
        low, high = wilson(round(mean * scores[0][1]), scores[0][1])
    return f"{mean:.3f} [{max(low, 0):.3f}, {min(high, 1):.3f}]"


def as_text(lines: list[list[str]]) -> str:
    """The table with aligned columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def as_markdown(lines: list[list[str]]) -> str:
    """The table as Markdown."""
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


@dataclass(frozen=True)
class Section:
    """One task of one result, with its picture."""

    result: dict[str, Any]
    task: str
    picture: Path
    committed: bool

    @property
    def heading(self) -> str:
        """What the task shows, and whose result it is."""
        seeds = len(self.result[self.task]["seeds"])
        whose = f"the committed result, {seeds} seeds" if self.committed else f"this run, {seeds} seeds"
        return f"{HEADINGS[self.task]} ({whose})"

    def text(self) -> str:
        """Heading and table for a terminal."""
        return f"\n{self.heading}\n{as_text(table(self.result, self.task))}\n"

    def html(self) -> str:
        """Heading, picture (inside the page) and table."""
        data = base64.b64encode(self.picture.read_bytes()).decode()
        return "\n".join(
            [
                f"<h2>{html.escape(self.heading)}</h2>",
                f"<p>{html.escape(_made_by(self.result[self.task]))}</p>",
                f'<img alt="{html.escape(HEADINGS[self.task])}" src="data:image/png;base64,{data}">',
                _html_table(table(self.result, self.task)),
            ]
        )


def page(sections: list[Section]) -> str:
    """A self-contained HTML page: no network, no scripts."""
    body = "\n".join(["<h1>What longer sleep buys</h1>", *(section.html() for section in sections)])
    return framed("lmsleep demo", body)


HEADINGS = {
    "depo": "Pointer chase: where is a node after k hops, once the graph is out of sight?",
    "rule110": "Rule 110: what are the cells after t steps, once the state is out of sight?",
}


def _html_table(lines: list[list[str]]) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + row(lines[0], "th") + "".join(row(line, "td") for line in lines[1:]) + "</table>"


def _made_by(part: dict[str, Any]) -> str:
    made = part["made_by"]
    return (
        f"{made['command']}: {len(part['seeds'])} seeds on {made['hardware']}, torch {made['torch']}, "
        f"lmsleep {made['lmsleep']} ({made['commit'] or 'installed'})"
    )
