"""Put results where they are shown: package data, pictures, and the tables of README, docs and results/.

lmsleep demo --full --out runs/committed
python tools/publish.py runs/committed/depo     (makes it the committed result, then all tables and pictures)
python tools/publish.py                         (all tables and pictures anew, from the committed results)
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from lmsleep.files import write_atomic
from lmsleep.recipes import RECIPES, figure
from lmsleep.recipes.demo import committed
from lmsleep.recipes.results import Result, interval
from lmsleep.recipes.table import as_markdown, published

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "src/lmsleep/recipes/committed"
PAGES = (ROOT / "README.md", ROOT / "docs/demo.md")


def blocks() -> dict[str, str]:
    """Return what stands in the blocks of the pages, by name."""
    tables = {f"table:{name}": committed(name) for name in ("depo", "rule110")}
    said = {
        name: f"{as_markdown(result.lines())}\n\n{result.seeds} seeds; {result.made_by}"
        for name, result in tables.items()
    }
    return said | {"summary:depo": summary(tables["table:depo"])}


def summary(result: Result) -> str:
    """Tabulate accuracy of every N at the hardest and over all difficulties, at either equal budget."""
    hardest = max(result.difficulties)
    lines = [["", *(f"{what}, equal {budget}" for what in (f"{result.key} = {hardest}", "all hops")
                    for budget in ("tokens", "compute"))]]  # fmt: skip
    for passes in sorted({row["passes"] for row in result.rows}):
        cell = result.own(cell=f"hybrid, N = {passes}")
        hard = [row for row in cell if row["difficulty"] == hardest]
        cells = [
            interval([row for row in rows if row["budget"] in (budget, "both")])
            for rows in (hard, cell)
            for budget in ("tokens", "compute")
        ]
        lines.append([f"N = {passes}", *cells])
    return as_markdown(lines)


def main() -> None:
    """Copy what is named, then write everything anew."""
    for folder in map(Path, sys.argv[1:]):
        # What `Result.load` reads; the figure and the CSV are made of it.
        for name in ("README.md", "results.jsonl", "curves.jsonl"):
            shutil.copy(folder / name, COMMITTED / folder.name / name)
    for name in ("depo", "rule110"):
        figure.save(committed(name), ROOT / f"docs/images/{name}.png")
    depo = committed("depo")
    # The same result, seen through two panels for the front page.
    story = replace(depo, recipe=replace(depo.recipe, panels=("tokens", "read")))
    figure.save(story, ROOT / "docs/images/story.png")
    for folder in sorted((ROOT / "results").iterdir()):
        # Folders are called RECIPE-SCALE, and recipes have dashes in their names too.
        result = Result.load(RECIPES[folder.name.rpartition("-")[0]], folder)
        # Written anew from its rows, for the recipe's words may have changed since.
        result.save(folder)
        figure.save(result, folder / "figure.png")
    for page in PAGES:
        write_atomic(page, published(page.read_text(), blocks()).encode())


if __name__ == "__main__":
    main()
