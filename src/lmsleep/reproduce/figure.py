"""From rows to the figure of a recipe: seeds as a band (lowest to highest) around their mean."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmsleep.evaluation import mean_interval
from lmsleep.reproduce.recipe import Recipe
from lmsleep.reproduce.results import Row

AXES = {"tokens": (1e6, "training tokens (millions)"), "flops": (1e12, "training compute (TFLOP)")}
LABELS = {"accuracy": "held-out accuracy", "tokens_per_second": "training tokens a second"}


def draw(recipe: Recipe, results: Sequence[Row], curves: Sequence[Row], name: str) -> Figure:
    """The figure, one panel each; a "grid" takes one for every N. `name` is that of the difficulty key."""
    passes = sorted({row["passes"] for row in results})
    panels = [(p, n) for p in recipe.panels for n in (passes if p == "grid" else [0])]
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for ax, (panel, n) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        if panel in AXES:
            _curves(ax, panel, curves, name)
        elif panel == "grid":
            _grid(ax, recipe, [r for r in results if r["passes"] == n], name)
            ax.set_title(f"N = {n}")
        elif panel == "final":
            _bars(ax, results)
        else:
            _lines(ax, panel, recipe, results, name)
        if panel not in ("final", "grid"):
            ax.legend(fontsize=8)
            if recipe.value == "accuracy":
                ax.axhline(results[0]["chance"], color="#999999", ls=":", lw=1)
                ax.set_ylim(-0.02, 1.02)
    figure.suptitle(recipe.title)
    return figure


def _curves(ax: Axes, panel: str, curves: Sequence[Row], name: str) -> None:
    unit, label = AXES[panel]
    for cell, rows in _groups(curves, "cell"):
        points = [(r["step"], r[panel] / unit, next(reversed(r["per_difficulty"].values()))) for r in rows]
        _band(ax, cell, points)
    ax.set(xlabel=label, ylabel=f"held-out accuracy, hardest {name}")


def _lines(ax: Axes, panel: str, recipe: Recipe, results: Sequence[Row], name: str) -> None:
    """The value against the difficulty, or at the hardest against the recipe's axis."""
    hardest = max((row.get("difficulty", 0) for row in results), default=0)
    key = "difficulty" if panel == "difficulty" else "at"
    for line, rows in _groups(results, "line"):
        mine = [
            r
            for r in rows
            if (r["passes_read"] == r["passes"] if key == "difficulty" else r.get("difficulty", 0) == hardest)
        ]
        _band(ax, line, [(r[key], r[key], r[recipe.value]) for r in mine], marker="o")
    places = [row[key] for row in results]
    if max(places) > 20 * max(min(places), 1):
        ax.set_xscale("log")
    else:
        ax.locator_params(axis="x", integer=True)
    ax.set(xlabel=name if key == "difficulty" else recipe.axis, ylabel=LABELS[recipe.value])


def _grid(ax: Axes, recipe: Recipe, rows: Sequence[Row], name: str) -> None:
    """Mean accuracy above chance, as a share of what there is above chance; axis times difficulty."""
    down, right = (sorted({row[key] for row in rows}) for key in ("at", "difficulty"))
    shares = np.full((len(down), len(right)), np.nan)
    for i, at in enumerate(down):
        for j, key in enumerate(right):
            mine = [r for r in rows if (r["at"], r["difficulty"]) == (at, key)]
            if mine:
                shares[i, j] = np.mean([(r["accuracy"] - r["chance"]) / (1 - r["chance"]) for r in mine])
    ax.imshow(shares, vmin=0, vmax=1, cmap="Greens", aspect="auto")
    for (i, j), value in np.ndenumerate(shares):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    ax.set(xticks=range(len(right)), yticks=range(len(down)), xlabel=name)
    ax.set(ylabel=f"{recipe.axis} (colour: accuracy above chance)")
    ax.set_xticklabels(right)
    ax.set_yticklabels(down)


def _bars(ax: Axes, results: Sequence[Row]) -> None:
    rows = [r for r in results if r["passes_read"] == r["passes"]]
    hardest = max(row["difficulty"] for row in results)
    cells = _groups(rows, "cell")
    for place, (_, mine) in enumerate(cells):
        # the hardest of the cell's own: a figure over t has another in each
        own = hardest if any(r["difficulty"] == hardest for r in mine) else max(r["difficulty"] for r in mine)
        values = [r["accuracy"] for r in mine if r["difficulty"] == own]
        mean, low, high = mean_interval(values)
        error = None if np.isnan(low) else [[mean - max(low, 0)], [min(high, 1) - mean]]
        ax.barh(place, mean, xerr=error, color="#1b7837", alpha=0.7)
        ax.plot(values, [place] * len(values), "k.", ms=4)
    ax.set(yticks=range(len(cells)), xlabel="final accuracy at the hardest (bar: mean, dots: seeds)")
    ax.set_yticklabels([cell for cell, _ in cells])
    ax.invert_yaxis()
    ax.axvline(results[0]["chance"], color="#999999", ls=":", lw=1)
    ax.set_xlim(0, 1.02)


def _groups(rows: Sequence[Row], key: str) -> list[tuple[str, list[Row]]]:
    return [(name, [r for r in rows if r[key] == name]) for name in dict.fromkeys(r[key] for r in rows)]


def _band(ax: Axes, label: str, points: Sequence[tuple[int, float, float]], **style: Any) -> None:
    """`points`: (what to group seeds by, x, y)."""
    groups = [[p for p in points if p[0] == key] for key in sorted({p[0] for p in points})]
    x = [group[0][1] for group in groups]
    y = [[value for _, _, value in group] for group in groups]
    (line,) = ax.plot(x, [np.mean(v) for v in y], label=label, **style)
    ax.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=line.get_color(), alpha=0.15, lw=0)
