"""Make a demo's result the committed one: package data, pictures and the tables in README and docs.

lmsleep demo --seeds 0 1 2 3 4 --out runs/committed
python experiments/publish.py runs/committed
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from lmsleep.demo.report import as_markdown, table

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "src/lmsleep/demo/results.json"
PAGES = (ROOT / "README.md", ROOT / "docs/demo.md")


def with_tables(page: str, result: dict[str, Any]) -> str:
    """`page` with every block `<!-- table:TASK -->...<!-- end -->` made anew from `result`."""

    def block(match: re.Match[str]) -> str:
        task = match.group(1)
        made, seeds = result[task]["made_by"], len(result[task]["seeds"])
        where = f"{made['hardware']}, torch {made['torch']}, commit {made['commit']}"
        source = f"`{made['command']}`, {seeds} seeds, {where}"
        lines = as_markdown(table(result, task))
        return f"<!-- table:{task} -->\n{lines}\n\n{source}\n<!-- end -->"

    return re.sub(r"<!-- table:(\w+) -->.*?<!-- end -->", block, page, flags=re.DOTALL)


def main() -> None:
    """Copy, merge (a run of one task keeps the other's part) and rewrite."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = Path(sys.argv[1])
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    new = json.loads((run / "results.json").read_text())
    result.update(new)
    RESULT.write_text(json.dumps(result) + "\n")
    (ROOT / "docs/images").mkdir(exist_ok=True)
    for task in new:
        shutil.copy(run / f"{task}.png", ROOT / f"docs/images/{task}.png")
    for page in PAGES:
        page.write_text(with_tables(page.read_text(), result))


if __name__ == "__main__":
    main()
