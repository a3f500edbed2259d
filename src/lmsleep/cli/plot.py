"""`lmsleep plot`: the curves of runs."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lmsleep.cli.options import parse
from lmsleep.recipes.figure import plot_runs
from lmsleep.training import RunFolder


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw loss and accuracy of runs into one picture."""

    runs: Positional[tuple[Path, ...]]
    """Folders of the runs."""
    out: Path = Path("curves.png")
    """Picture to write: .png, .svg or .pdf."""
    x: Literal["tokens", "flops", "seconds", "step"] = "tokens"
    """Quantity of the horizontal axis."""


def plot(argv: list[str]) -> None:
    """Run `lmsleep plot RUN...`."""
    options = parse(PlotOptions, argv, "lmsleep plot")
    if not options.runs:
        raise ValueError("runs must name at least one folder of a run")
    # Named before the runs are read, where matplotlib would fail in the end with a list of its formats.
    if options.out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out={options.out} must end in .png, .svg or .pdf")
    if not options.out.parent.is_dir():
        raise FileNotFoundError(f"out={options.out}: there is no folder {options.out.parent}")
    plot_runs([RunFolder.open(path) for path in options.runs], options.out, options.x)
    sys.stdout.write(f"{options.out}\n")
