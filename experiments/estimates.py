"""How long each recipe takes on this machine, as the Markdown table of docs/experiments.md.

python experiments/estimates.py [FIGURE ...]

FLOPs are counted, and seconds follow from the rate of a short pass (`lmsleep reproduce FIGURE --dry-run`
shows both run by run). Evaluation is left out.
"""

import sys
from typing import get_args

import torch

from lmsleep.reproduce import RECIPES, Scale
from lmsleep.reproduce.command import estimate, side_by_side
from lmsleep.training import default_workers, provenance

SEEDS = 3
TOO_LARGE = {("6", "paper"): "1.4 billion parameters: on a GPU"}  # a single pass would take hours on a CPU


def entry(figure: str, scale: Scale) -> str:
    """FLOPs and time of a recipe at a scale, or why there is none."""
    if (figure, scale) in TOO_LARGE and not torch.cuda.is_available():
        return TOO_LARGE[figure, scale]
    try:
        rows = estimate(RECIPES[figure].cells(scale), SEEDS)
    except ValueError:  # what a scale needs is not at hand
        return "needs pretrained weights"
    flops = sum(row["runs"] * row["flops"] for row in rows)
    hours = side_by_side(rows, default_workers()) / 3600
    return f"{flops / 1e15:,.3g} PFLOP, {hours:,.1f} h"


def main() -> None:
    """Print the table, a line as soon as it is known."""
    figures, scales = sys.argv[1:] or [*RECIPES], get_args(Scale)
    torch.set_num_threads(1)
    lines = [["figure", *scales], ["---"] * (1 + len(scales))]
    for line in lines:
        sys.stdout.write(f"| {' | '.join(line)} |\n")
    for figure in figures:
        cells = [entry(figure, scale) for scale in scales]
        sys.stdout.write(f"| `{figure}` | {' | '.join(cells)} |\n")
        sys.stdout.flush()
    made = provenance()
    where = f"{made['hardware']}, torch {made['torch']}, commit {made['commit']}"
    sys.stdout.write(f"\n{SEEDS} seeds, {default_workers()} at a time; `{made['command']}`, {where}\n")


if __name__ == "__main__":
    main()
