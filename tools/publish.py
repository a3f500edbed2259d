"""Put results where they are shown: package data, pictures, and the tables of README, docs and results/.

lmsleep demo --full --out runs/committed
python tools/publish.py runs/committed/depo     (makes it the committed result, then all tables and pictures)
python tools/publish.py                         (all tables and pictures anew, from the committed results)
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path

from lmsleep.files import write_atomic
from lmsleep.recipes import GROUPS, RECIPES, figure
from lmsleep.recipes.demo import committed
from lmsleep.recipes.results import Result, floors
from lmsleep.recipes.rivals import HEADS, bytes_of
from lmsleep.recipes.table import as_markdown, published

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "src/lmsleep/recipes/committed"
PAGES = (ROOT / "README.md", ROOT / "docs/demo.md", ROOT / "docs/rivals.md")


def blocks() -> dict[str, str]:
    """Return what stands in the blocks of the pages, by name."""
    tables = {f"table:{name}": committed(name) for name in ("depo", "rule110")}
    said = {
        name: f"{as_markdown(result.lines())}\n\n{result.named_seeds}; {result.made_by}"
        for name, result in tables.items()
    }
    rivals = {}
    for name in GROUPS["rivals"]:
        folder = ROOT / f"results/{name}-demo"
        if folder.exists():
            result = Result.load(RECIPES[name], folder)
            lines = as_markdown(side_by_side(result, result.shown))
            rivals[name] = f"{lines}\n\n{result.named_seeds}; {result.made_by}"
    return said | rivals | {"summary:depo": summary(tables["table:depo"])}


def summary(result: Result) -> str:
    """Tabulate accuracy of every N at the hardest and over all difficulties, at either equal budget."""
    hardest = max(result.difficulties)
    lines = [["", *(f"{what}, equal {budget}" for what in (f"{result.key} = {hardest}", "all hops")
                    for budget in ("tokens", "compute"))]]  # fmt: skip
    for passes in sorted({row["passes"] for row in result.rows}):
        cell = result.own(cell=f"hybrid, N = {passes}")
        hard = [row for row in cell if row["difficulty"] == hardest]
        cells = [
            result.figure([row for row in rows if row["budget"] in (budget, "both")])
            for rows in (hard, cell)
            for budget in ("tokens", "compute")
        ]
        lines.append([f"N = {passes}", *cells])
    return as_markdown(lines)


def side_by_side(result: Result, ends: Sequence[int]) -> list[list[str]]:
    """Tabulate accuracy of every rival at some difficulties, for each share of the bytes."""
    lines = [["", *(f"{result.key} = {end}, {bytes_of(share):,} bytes" for end in ends for share in HEADS)]]
    sized = {row["line"] for row in result.rows if row["cell"] == f"{row['line']} (4)"}
    for line, kept in {row["line"]: row["bytes"] for row in result.rows}.items():
        names = [f"{line} ({share})" for share in HEADS]
        if line not in sized:  # where it would have room, or else where it has most
            place = next((share for share in HEADS if kept <= bytes_of(share)), "4")
            names = [line if share == place else "" for share in HEADS]
            line = f"{line}: {kept:,} bytes"
        found = [
            [r for r in result.own(difficulty=end) if r["cell"] == name] for end in ends for name in names
        ]
        lines.append([line, *(result.figure(rows) if rows else "" for rows in found)])
    for name, known in floors(result.rows, ends):
        lines.append(
            [f"floor: {name}", *("" if isnan(low) else f"{low:.3f}" for low in known for _ in HEADS)]
        )
    return lines


def main() -> None:
    """Copy what is named, then write everything anew."""
    for folder in map(Path, sys.argv[1:]):
        # What `Result.load` reads; the figure and the CSV are made of it.
        for name in ("README.md", "results.jsonl", "curves.jsonl"):
            shutil.copy(folder / name, COMMITTED / folder.name / name)
    for name in ("depo", "rule110"):
        figure.save(committed(name), ROOT / f"docs/images/{name}.png")
        # Anew, for what is said with a table may have changed since; its figure is that of the docs.
        write_atomic(COMMITTED / name / "README.md", committed(name).page().encode())
    depo = committed("depo")
    # The same result, seen through two panels for the front page.
    story = replace(depo, recipe=replace(depo.recipe, panels=("tokens", "read")))
    figure.save(story, ROOT / "docs/images/story.png")
    for folder in sorted(page.parent for page in (ROOT / "results").glob("*/README.md")):
        # Folders are called RECIPE-SCALE, and recipes have dashes in their names too.
        name = folder.name.rpartition("-")[0]
        result = Result.load(RECIPES[name], folder)
        # Written anew from its rows, for the recipe's words may have changed since.
        result.save(folder)
        figure.save(result, folder / "figure.png")
        if name in GROUPS["rivals"]:
            figure.save(result, ROOT / f"docs/images/{name}.png")
    for page in PAGES:
        write_atomic(page, published(page.read_text(), blocks()).encode())


if __name__ == "__main__":
    main()
