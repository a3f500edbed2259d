"""Which committed results are older than the code: would today's code still begin to train as theirs did?

    python tools/age.py                                   (all in results/, and those in the package)
    python tools/age.py results/rivals-mqar-demo

Cells and their steps are compared, and of every cell the run of seed 0 is trained to its first record, a
second or so, and its loss compared with the one that the result holds. What comes later in a run is not seen,
and of results of before losses were kept no loss. It ends with status 1 if anything differs that is not known
to (`OLDER`), a loss by more than rounding does on another machine.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from lmsleep.recipes import RECIPES
from lmsleep.recipes.recipe import Cell
from lmsleep.recipes.settings import Scale
from lmsleep.training import RunFolder, Trainer

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "src/lmsleep/recipes/committed"
# Whose steps are known to differ, and why they stay for now; docs say so where they show them.
OLDER = {
    "compute-matched-demo": "depth was not added by whole patterns, and FLOPs left out attention's products",
    "depo": "FLOPs left out attention's products",
    "rivals-depo-demo": "nothing kept was trained for the steps of the whole cache",
    "rivals-mqar-demo": "nothing kept was trained for the steps of the whole cache",
    "rule110": "FLOPs left out attention's products",
}
BEGIN_WITH_WEIGHTS = {"recall-demo"}
ROUNDING = 1e-3  # relative; of ten steps in another order of sums


def results() -> list[Path]:
    """Return the folders of all committed results."""
    pages = [*(ROOT / "results").glob("*/README.md"), *COMMITTED.glob("*/README.md")]
    return sorted(page.parent for page in pages)


def changed(folder: Path) -> Iterator[str]:
    """Yield in words what is otherwise today: cells, their steps, the first losses of seed 0."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    # Cells of two budgets share a name.
    then = {(row["cell"], row.get("budget")): row for row in rows if row["seed"] == 0}
    today = {(cell.label, cell.budget): cell for cell in cells(folder)}
    yield from (f"{name[0]}: no cell of today" for name in then if name not in today)
    yield from (f"{name[0]}: not in the result" for name in today if name not in then)
    for name in [name for name in today if name in then]:
        cell, row = today[name], then[name]
        if row["step"] != cell.config.train.steps:
            yield f"{cell.label}: {row['step']} steps then, {cell.config.train.steps} now"
        # A run that starts from another, or is one of another cell, is not trained.
        if "first_loss" in row and cell.start is None and cell.reading is None:
            step, loss = row["first_loss"]
            now = first_loss(cell, step)
            if not math.isclose(loss, now, rel_tol=ROUNDING):
                yield f"{cell.label}: loss {loss:.6f} at step {step} then, {now:.6f} now"


def unknown(folder: Path, found: list[str]) -> list[str]:
    """Return what differs beyond the steps of `OLDER`."""
    return [line for line in found if folder.name not in OLDER or " steps then, " not in line]


def cells(folder: Path) -> list[Cell]:
    """Return the cells of the recipe that a folder's name tells: RECIPE-SCALE, or RECIPE in the package."""
    name, _, scale = folder.name.rpartition("-")
    known: dict[str, Scale] = {"demo": "demo", "small": "small", "paper": "paper"}
    if scale not in known:
        return RECIPES[folder.name].cells("demo")
    return RECIPES[name].cells(known[scale])


def first_loss(cell: Cell, step: int) -> float:
    """Train the run of seed 0 for so many steps, and return the loss of the last."""
    trainer = Trainer(RunFolder("unused"), cell.with_seed(0))
    record = {}
    for _ in range(step):
        record = trainer.train_step()
    return float(record["loss"])


def main() -> None:
    """Say it for every result."""
    torch.set_num_threads(1)
    differ = False
    for folder in [Path(name) for name in sys.argv[1:]] or results():
        if folder.name in BEGIN_WITH_WEIGHTS:
            sys.stdout.write(
                f"{folder.name}: not checked, for its runs begin with weights that lie elsewhere\n"
            )
            continue
        found = [*changed(folder)]
        differ |= bool(unknown(folder, found))
        seen = (
            "as today"
            if "first_loss" in (folder / "results.jsonl").read_text()
            else "cells and steps as today"
        )
        sys.stdout.write(f"{folder.name}: {'older than the code' if found else seen}\n")
        sys.stdout.write(f"  known: {OLDER[folder.name]}\n" if folder.name in OLDER else "")
        sys.stdout.write("".join(f"  {line}\n" for line in found))
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
