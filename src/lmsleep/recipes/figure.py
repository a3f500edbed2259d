"""From rows to the figure of a recipe: seeds as points, and a band (lowest to highest) around their mean."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lmsleep.evaluation import mean_interval
from lmsleep.heatmap import heat_map
from lmsleep.recipes.results import Result, Row, floor
from lmsleep.training import RunFolder

AXES = {"tokens": (1e6, "training tokens (millions)"), "flops": (1e12, "training compute (TFLOP)")}
KEPT = {
    "bytes": "bytes kept of a context",
    "context_flops": "FLOPs to read and keep a context",
    "token_flops": "FLOPs of an answered token",
    "token_seconds": "seconds of an answered token",
    "parameters": "parameters",
}
LABELS = {"accuracy": "held-out accuracy", "tokens_per_second": "training tokens a second"}
IN_A_ROW = 3  # panels
FLOOR: Any = {"color": "#999999", "ls": ":", "lw": 1}
# Ten colors, then the same dashed.
CYCLE = cycler(linestyle=["-", "--"]) * mpl.rcParamsDefault["axes.prop_cycle"]


def draw(result: Result) -> Figure:
    """Draw a result, panel by panel; a "grid" takes one for each N, a frontier one for each `shown`."""
    recipe = result.recipe
    passes = sorted({row["passes"] for row in result.rows})
    # Results of before the loss was measured by difficulty have no such panel.
    told = bool(result.curves) and all("loss_per_difficulty" in row for row in result.curves)
    wanted = [p for p in recipe.panels if p != "loss" or told]
    several = {"grid": passes, **dict.fromkeys(KEPT, result.shown)}
    panels = [(p, n) for p in wanted for n in several.get(p, [0])]
    down = ceil(len(panels) / IN_A_ROW)
    right = ceil(len(panels) / down)
    # Without pyplot: no display is needed, and no global list keeps the figure alive.
    figure = Figure(figsize=(6 * right, 4.5 * down), layout="constrained")
    # subplots gives one Axes, a row or a grid, by its numbers.
    with mpl.rc_context({"axes.prop_cycle": CYCLE}):
        axes = np.atleast_1d(figure.subplots(down, right)).flat
    for ax, (panel, n) in zip(axes, panels, strict=False):
        if panel in AXES:
            _curves(ax, panel, result)
        elif panel == "loss":
            _losses(ax, result)
        elif panel == "grid":
            _grid(ax, result, n)
        elif panel == "read":
            _read(ax, result)
        elif panel == "final":
            _ends(ax, result)
        elif panel in KEPT:
            _frontier(ax, panel, result, n)
        else:
            _lines(ax, panel, result)
        # Those three name their own lines, or have none.
        if panel not in ("final", "grid", "read"):
            if panel not in KEPT:
                ax.legend(fontsize=8)
            if recipe.value == "accuracy" and panel != "loss":
                ax.set_ylim(-0.02, 1.02)
    if any(panel in KEPT for panel, _ in panels):
        # Too many lines for a panel, and the same in all.
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(recipe.title)
    return figure


def save(result: Result, path: Path) -> None:
    """Draw a result into a file."""
    draw(result).savefig(path, dpi=130)


def plot_runs(runs: Sequence[RunFolder], path: Path, x: str = "tokens") -> None:
    """Draw loss and accuracy of runs against tokens, flops, seconds or steps.

    Raises:
        ValueError: if a run has no metrics yet.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        metrics = list(run.metrics())
        losses = [m for m in metrics if "loss" in m]
        scores = [m for m in metrics if "eval" in m]
        if not losses:
            raise ValueError(f"{run.path} has no metrics yet")
        left.plot([m[x] for m in losses], [m["loss"] for m in losses], lw=1, label=run.path.name)
        right.plot([m[x] for m in scores], [m["eval"]["accuracy"] for m in scores], label=run.path.name)
    left.set(xlabel=x, ylabel="training loss (nats)")
    right.set(xlabel=x, ylabel="held-out accuracy")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _curves(ax: Axes, panel: str, result: Result) -> None:
    """Draw accuracy at the hardest over training, against tokens or FLOPs."""
    unit, label = AXES[panel]
    for cell, rows in _groups(result.curves, "cell"):
        # The last difficulty is the hardest: they are written rising. Seeds are grouped by step, for their
        # tokens and FLOPs may differ where lengths are drawn.
        points = [(r["step"], r[panel] / unit, next(reversed(r["per_difficulty"].values()))) for r in rows]
        _band(ax, cell, points)
    ax.axhline(floor(_hardest(result)), **FLOOR)
    ax.set(xlabel=label, ylabel=f"held-out accuracy, hardest {result.key}")


def _losses(ax: Axes, result: Result) -> None:
    """Draw the test loss of each difficulty over training: a colour a cell, paler where it is easier."""
    for number, (cell, rows) in enumerate(_groups(result.curves, "cell")):
        keys = sorted({key for row in rows for key in row["loss_per_difficulty"]}, key=int)
        for place, key in enumerate(keys, 1):
            steps = sorted({row["step"] for row in rows})
            means = [
                float(np.mean([r["loss_per_difficulty"][key] for r in rows if r["step"] == step]))
                for step in steps
            ]
            label, shade = f"{cell}, {result.key} = {key}", place / len(keys)
            ax.plot(steps, means, lw=1, ls="-", label=label, color=f"C{number}", alpha=shade)
    ax.set(xlabel="step", ylabel="test loss (nats a token of the answer)")


def _lines(ax: Axes, panel: str, result: Result) -> None:
    """Draw the value against the difficulty, or at the hardest against the recipe's axis."""
    recipe = result.recipe
    key = "difficulty" if panel == "difficulty" else "at"
    hardest = max(result.difficulties, default=0)
    rows = _at_most_compute(result) if key == "difficulty" else result.rows
    for line, mine in _groups(rows, "line"):
        points = [r for r in mine if key == "difficulty" or r.get("difficulty", 0) == hardest]
        _band(ax, line, [(r[key], r[key], r[recipe.value]) for r in points], marker="o")
    if recipe.value == "accuracy":
        shown = rows if key == "difficulty" else _hardest(result)
        floors = sorted((x, floor(some)) for x, some in _groups(shown, key))
        if len(floors) == 1:
            ax.axhline(floors[0][1], **FLOOR)
        else:
            ax.plot(*zip(*floors, strict=True), **FLOOR)
    places = [row[key] for row in result.rows]
    if recipe.together and key == "difficulty":
        ax.set_xticks(result.difficulties, map(result.named, result.difficulties), rotation=30, ha="right")
    # Places that span more than a decade, such as 1 ... 1000 sleeps, would crowd at the left.
    elif max(places) > 20 * max(min(places), 1):
        ax.set_xscale("log")
    else:
        ax.locator_params(axis="x", integer=True)
    ax.set(xlabel=result.key if key == "difficulty" else recipe.axis, ylabel=LABELS[recipe.value])


def _at_most_compute(result: Result) -> list[Row]:
    """Return own readings; of what was trained at equal tokens and at equal compute, the latter."""
    rows = result.own()
    longer = {row["line"] for row in rows if row.get("budget") == "compute"}
    return [r for r in rows if r.get("budget") != "tokens" or r["line"] not in longer]


def _grid(ax: Axes, result: Result, passes: int) -> None:
    """Draw mean accuracy above chance, as a share of what there is above it; axis times difficulty."""
    rows = [row for row in result.rows if row["passes"] == passes]
    down, right = (sorted({row[key] for row in rows}) for key in ("at", "difficulty"))
    heat_map(ax, _means(rows, "at", down, right, above_chance=True), down, right, size=10)
    ax.set(xlabel=result.key, ylabel=f"{result.recipe.axis} (colour: accuracy above chance)")
    ax.set_title(f"N = {passes}")


def _read(ax: Axes, result: Result) -> None:
    """Draw the accuracy of the runs with most passes, read with fewer and more."""
    most = max(row["passes"] for row in result.rows)
    rows = [row for row in result.rows if row["passes"] == most]
    down = sorted({row["passes_read"] for row in rows})
    heat_map(ax, _means(rows, "passes_read", down, result.difficulties), down, result.difficulties, size=10)
    ax.set(xlabel=result.key, ylabel="N when read", title=f"trained with N = {most}: accuracy")


def _means(
    rows: Sequence[Row], key: str, down: Sequence[int], right: Sequence[int], *, above_chance: bool = False
) -> list[list[float]]:
    """Return mean accuracies `[down][right]` of the rows by `key` and difficulty."""

    def value(row: Row) -> float:
        return (row["accuracy"] - row["chance"]) / (1 - row["chance"]) if above_chance else row["accuracy"]

    found = [[[value(r) for r in rows if (r[key], r["difficulty"]) == (i, j)] for j in right] for i in down]
    # NaN leaves a hole where a cell has no such difficulty.
    return [[float(np.mean(values)) if values else np.nan for values in line] for line in found]


def _ends(ax: Axes, result: Result) -> None:
    """Draw the accuracy at the end, a bar for each cell and a dot for each seed."""
    rows, hardest = _at_most_compute(result), max(result.difficulties)
    cells = _groups(rows, "cell")
    for place, (_, mine) in enumerate(cells):
        # the hardest of the cell's own: a figure over t has another in each
        own = hardest if any(r["difficulty"] == hardest for r in mine) else max(r["difficulty"] for r in mine)
        values = [r["accuracy"] for r in mine if r["difficulty"] == own]
        mean, low, high = mean_interval(values)
        # Clipped to what an accuracy can be; of one or two seeds an interval says nothing.
        error = None if len(values) < 3 else [[mean - max(low, 0)], [min(high, 1) - mean]]
        ax.barh(place, mean, xerr=error, color="#1b7837", alpha=0.7)
        ax.plot(values, [place] * len(values), "k.", ms=4)
    ax.set(yticks=range(len(cells)), xlabel="final accuracy at the hardest (bar: mean, dots: seeds)")
    ax.set_yticklabels([cell for cell, _ in cells])
    ax.invert_yaxis()
    ax.axvline(floor(_hardest(result)), **FLOOR)
    ax.set_xlim(0, 1.02)


def _frontier(ax: Axes, panel: str, result: Result, difficulty: int) -> None:
    """Draw accuracy against what is kept or what that costs: sizes of a method joined, and the frontier."""
    rows = [row for row in result.own() if row["difficulty"] == difficulty]
    best = list[tuple[float, float]]()
    for number, (line, mine) in enumerate(_groups(rows, "line")):
        cells = [some for _, some in _groups(mine, "cell")]
        points = sorted((some[0][panel], float(np.mean([r["accuracy"] for r in some]))) for some in cells)
        style: dict[str, Any] = {
            "color": f"C{number % 10}", "marker": "osv^"[number // 10], "ms": 5, "ls": "-"
        }  # fmt: skip
        aside = "aside" in mine[0]
        ax.plot(
            *zip(*points, strict=True), lw=0.8, label=line, fillstyle="none" if aside else "full", **style
        )
        seeds = [(r[panel], r["accuracy"]) for r in mine]
        ax.plot(*zip(*seeds, strict=True), ".", ms=3, color=style["color"])
        best += [] if aside else points  # of another budget
    best.sort()
    reached = np.maximum.accumulate([y for _, y in best])
    ax.step([x for x, _ in best], reached, where="post", color="black", ls="--", lw=1, label="frontier")
    if panel == "bytes":  # nothing kept are 0 of them
        ax.set_xscale("symlog", linthresh=512, subs=[1])
    else:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))  # more labels would run into each other
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.axhline(floor(rows), **FLOOR)  # behind the scale, which the limits of x depend on
    ax.set(xlabel=KEPT[panel], ylabel=f"held-out accuracy, {result.named(difficulty)}")


def _hardest(result: Result) -> list[Row]:
    hardest = max(result.difficulties)
    return [row for row in result.rows if row["difficulty"] == hardest]


def _groups(rows: Sequence[Row], key: str) -> list[tuple[Any, list[Row]]]:
    """Return the rows by what they have under `key`, in the order of its first appearance."""
    return [(name, [r for r in rows if r[key] == name]) for name in dict.fromkeys(r[key] for r in rows)]


def _band(ax: Axes, label: str, points: Sequence[tuple[int, float, float]], **style: Any) -> None:
    """Draw `points`: (what to group seeds by, x, y)."""
    groups = [[p for p in points if p[0] == key] for key in sorted({p[0] for p in points})]
    x = [group[0][1] for group in groups]
    y = [[value for _, _, value in group] for group in groups]
    (line,) = ax.plot(x, [np.mean(v) for v in y], label=label, **style)
    color = line.get_color()
    ax.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=color, alpha=0.15, lw=0)
    ax.plot(*zip(*((at, v) for at, some in zip(x, y, strict=True) for v in some), strict=True), ".",
            ms=3, color=color, alpha=0.6)  # fmt: skip
