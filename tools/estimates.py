"""How long each recipe takes on this machine, as the Markdown table of docs/experiments.md.

python tools/estimates.py [FIGURE ...] [--scales demo small paper]

With the default seeds of each scale. FLOPs are counted, and seconds follow from the rate of a short pass
(`lmsleep reproduce FIGURE --dry-run` shows both run by run). Evaluation is left out.
"""

import argparse
import sys
from typing import get_args

from lmsleep.recipes import RECIPES, Scale
from lmsleep.recipes.estimate import estimate, side_by_side
from lmsleep.recipes.run import default_seeds
from lmsleep.recipes.table import source
from lmsleep.training import default_workers, provenance


def entry(figure: str, scale: Scale) -> str:
    """Return FLOPs and time of a recipe at a scale, or say why there is none."""
    try:
        rows = [*estimate(RECIPES[figure].cells(scale), default_seeds(scale))]
    except ValueError:  # what a scale needs is not at hand
        return "needs pretrained weights"
    flops = sum(row["runs"] * row["flops"] for row in rows)
    seconds = side_by_side(rows, default_workers())
    if seconds is None:
        return f"{flops / 1e15:,.3g} PFLOP, on a GPU"
    hours = seconds / 3600
    return f"{flops / 1e15:,.3g} PFLOP, " + (f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.0f} min")


def main() -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", default=[*RECIPES])
    parser.add_argument("--scales", nargs="+", choices=get_args(Scale), default=get_args(Scale))
    options = parser.parse_args()
    lines = [["figure", *options.scales], ["---"] * (1 + len(options.scales))]
    for line in lines:
        sys.stdout.write(f"| {' | '.join(line)} |\n")
    for figure in options.figures:
        cells = [entry(figure, scale) for scale in options.scales]
        sys.stdout.write(f"| `{figure}` | {' | '.join(cells)} |\n")
        # A line can take minutes; one wants to see it before the next.
        sys.stdout.flush()
    # Hours mean nothing without the machine they are of.
    made = provenance()
    sys.stdout.write(f"\n{default_workers()} runs at a time; `{made['command']}`, {source(made)}\n")


if __name__ == "__main__":
    main()
