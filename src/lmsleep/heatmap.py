"""One heat map for every figure: values from 0 to 1 in rows and columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

DARK = 0.6  # values above it lie on a green too dark for black figures


def heat_map(
    ax: Axes,
    values: ArrayLike,
    rows: Sequence[Any],
    columns: Sequence[Any],
    *,
    numbers: bool = True,
    size: float = 8,
) -> None:
    """Draw `values` `[rows, columns]` with their labels, and unless told otherwise with the numbers in them.

    Args:
        ax: where to draw.
        values: from 0 to 1; nan for a place without one.
        rows: labels, top to bottom.
        columns: labels, left to right.
        numbers: whether every value is written into its place.
        size: of these numbers, in points.
    """
    grid = np.asarray(values)
    ax.imshow(grid, vmin=0, vmax=1, cmap="Greens", aspect="auto", interpolation="nearest")
    if numbers:
        for (i, j), value in np.ndenumerate(grid):
            colour = "white" if value > DARK else "black"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=size)
    ax.set(xticks=range(len(columns)), yticks=range(len(rows)))
    ax.set_xticklabels(list(map(str, columns)))
    ax.set_yticklabels(list(map(str, rows)))
