"""From finished runs to rows, and from rows to data files, a table and a figure."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmsleep.evaluation import evaluate, mean_interval
from lmsleep.files import write_atomic
from lmsleep.reproduce.recipe import Recipe
from lmsleep.training import Job, RunFolder

Row = dict[str, Any]
AXES = {"tokens": (1e6, "training tokens (millions)"), "flops": (1e12, "training compute (TFLOP)")}


def collect(recipe: Recipe, jobs: Sequence[tuple[str, Job]]) -> tuple[list[Row], list[Row]]:
    """Results (one row a cell, seed, passes read and difficulty) and learning curves of finished runs."""
    results, curves = [], []
    for label, job in jobs:
        run = RunFolder.open(job.path)
        report, config = run.report(), job.config
        assert report is not None, f"{job.path} is not finished"
        cell = {"cell": label, "seed": config.train.seed, "passes": config.sleep.passes}
        spent = {key: report[key] for key in ("step", "tokens", "flops", "seconds")}
        scores = {config.sleep.passes: report["eval"]}
        for passes in recipe.read:
            if passes not in scores:
                sleep = replace(config.sleep, passes=passes, backprop_passes=None)
                scores[passes] = evaluate(run.model(), config.task, sleep, batches=8).to_dict()
        for passes, score in sorted(scores.items()):
            for key, accuracy in score["per_difficulty"].items():
                answers = score["answers"][key]
                difficulty = {"difficulty": int(key), "accuracy": accuracy, "answers": answers}
                results.append({**cell, "passes_read": passes, **difficulty, **spent})
        for point in run.metrics():
            if "eval" in point:
                at = {key: point[key] for key in ("step", "tokens", "flops", "seconds")}
                curves.append({**cell, **at, "per_difficulty": point["eval"]["per_difficulty"]})
    return results, curves


def write_data(folder: Path, results: Sequence[Row], curves: Sequence[Row]) -> None:
    """`results.jsonl`, `results.csv` and `curves.jsonl`."""
    for name, rows in (("results", results), ("curves", curves)):
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(results[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    write_atomic(folder / "results.csv", text.getvalue().encode())


def table(recipe: Recipe, results: Sequence[Row], name: str, floors: dict[str, float]) -> str:
    """Markdown: mean accuracy over seeds with its 95 % interval, a line per cell and passes read."""
    keys = sorted({row["difficulty"] for row in results})
    header = ["model", "read with N", "steps", "TFLOP", *(f"{name} = {key}" for key in keys)]
    lines = [header, ["---"] * len(header)]
    for cell, passes in dict.fromkeys((row["cell"], row["passes_read"]) for row in results):
        mine = [r for r in results if (r["cell"], r["passes_read"]) == (cell, passes)]
        figures = [_mean([r["accuracy"] for r in mine if r["difficulty"] == key]) for key in keys]
        lines.append([cell, str(passes), str(mine[0]["step"]), f"{mine[0]['flops'] / 1e12:.3g}", *figures])
    for floor, value in floors.items():
        if "=" not in floor:
            own = [floors.get(f"{floor} {name}={key}", value) for key in keys]
            lines.append([floor, "", "", "", *(f"{value:.3f}" for value in own)])
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    seeds = len({row["seed"] for row in results})
    return f"# {recipe.title}\n\n{recipe.expects}\n\nMean over {seeds} seeds [95 % interval].\n\n{body}\n"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, low, high = mean_interval(values)
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} [{max(low, 0):.3f}, {min(high, 1):.3f}]"


def draw(recipe: Recipe, results: Sequence[Row], curves: Sequence[Row], name: str, chance: float) -> Figure:
    """The figure: one panel each, seeds as a band (lowest to highest) around their mean."""
    figure = Figure(figsize=(6 * len(recipe.panels), 4.5), layout="constrained")
    hardest = max(row["difficulty"] for row in results)
    for ax, panel in zip(np.atleast_1d(figure.subplots(1, len(recipe.panels))), recipe.panels, strict=True):
        if panel in AXES:
            unit, label = AXES[panel]
            for cell, rows in _cells(curves):
                points = [
                    (r["step"], r[panel] / unit, next(reversed(r["per_difficulty"].values()))) for r in rows
                ]
                _band(ax, cell, points)
            ax.set(xlabel=label, ylabel=f"held-out accuracy, hardest {name}")
        elif panel == "final":
            _bars(ax, results, hardest)
        else:
            axis = {"difficulty": "difficulty", "passes": "passes_read"}[panel]
            for cell, rows in _cells(results):
                mine = [
                    r
                    for r in rows
                    if (r["difficulty"] == hardest if panel == "passes" else r["passes_read"] == r["passes"])
                ]
                _band(ax, cell, [(r[axis], r[axis], r["accuracy"]) for r in mine], marker="o")
            ax.locator_params(axis="x", integer=True)
            ax.set(
                xlabel={"difficulty": name, "passes": f"N when read ({name} = {hardest})"}[panel],
                ylabel="held-out accuracy",
            )
        if panel == "final":
            ax.axvline(chance, color="#999999", ls=":", lw=1)
            ax.set_xlim(0, 1.02)
        else:
            ax.axhline(chance, color="#999999", ls=":", lw=1)
            ax.set_ylim(-0.02, 1.02)
            ax.legend(fontsize=8)
    figure.suptitle(recipe.title)
    return figure


def _cells(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(cell, [r for r in rows if r["cell"] == cell]) for cell in dict.fromkeys(r["cell"] for r in rows)]


def _band(ax: Axes, label: str, points: Sequence[tuple[int, float, float]], **style: Any) -> None:
    """`points`: (what to group seeds by, x, y)."""
    groups = [[p for p in points if p[0] == key] for key in sorted({p[0] for p in points})]
    x = [group[0][1] for group in groups]
    y = [[value for _, _, value in group] for group in groups]
    (line,) = ax.plot(x, [np.mean(v) for v in y], label=label, **style)
    ax.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=line.get_color(), alpha=0.15, lw=0)


def _bars(ax: Axes, results: Sequence[Row], hardest: int) -> None:
    rows = [r for r in results if r["passes_read"] == r["passes"]]
    cells = _cells(rows)
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
