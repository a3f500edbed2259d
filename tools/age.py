"""Which committed results are older than the code: would today's code still begin to train as theirs did?

    python tools/age.py                                   (all in results/, and those in the package)
    python tools/age.py results/rivals-mqar-demo

Of every cell the run of seed 0 is trained to its first record, a second or so, and its loss compared with the
one that the result holds. Results of before losses were kept are told as such. It ends with status 1 if a
loss differs by more than rounding does on another machine.
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
ROUNDING = 1e-3  # relative; of ten steps in another order of sums


def results() -> list[Path]:
    """Return the folders of all committed results."""
    pages = [*(ROOT / "results").glob("*/README.md"), *COMMITTED.glob("*/README.md")]
    return sorted(page.parent for page in pages)


def changed(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Yield cell, loss then and loss now, where a run of seed 0 begins otherwise today.

    Raises:
        LookupError: if the result holds no first losses.
    """
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    then = {row["cell"]: row["first_loss"] for row in rows if "first_loss" in row and row["seed"] == 0}
    if not then:
        raise LookupError(f"{folder} holds no first losses")
    for cell in cells(folder):
        if cell.label in then and cell.start is None and cell.reading is None:
            step, loss = then[cell.label]
            now = first_loss(cell, step)
            if not math.isclose(loss, now, rel_tol=ROUNDING):
                yield cell.label, loss, now


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
        try:
            found = [*changed(folder)]
        except LookupError:
            sys.stdout.write(f"{folder.name}: unknown, made before first losses were kept\n")
            continue
        differ |= bool(found)
        sys.stdout.write(f"{folder.name}: {'older than the code' if found else 'as today'}\n")
        for label, loss, now in found:
            sys.stdout.write(f"  {label}: {loss:.6f} then, {now:.6f} now\n")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
