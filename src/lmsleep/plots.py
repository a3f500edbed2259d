"""Figures: learning curves of runs, and the demo's picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmsleep.evaluation import mean_interval
from lmsleep.training import RunFolder

COLOURS = {"hybrid, N = 1": "#8da0cb", "hybrid, N = 2": "#fc8d62", "hybrid, N = 4": "#1b7837"}
LEFT = {"transformer, cache kept": "#777777", "transformer, cache evicted": "#bbbbbb"}


def plot_runs(runs: Sequence[RunFolder], path: Path, x: str = "tokens") -> None:
    """Loss and accuracy of runs against tokens, flops, seconds or steps.

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


def plot_demo(part: dict[str, Any], path: Path) -> None:
    """The demo's picture for one task: curves per token and per FLOP, accuracy per difficulty.

    Where the part has them: hops answered per pass, and the fast weights of one head after each pass.
    """
    rich = "sleep" in part
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 7.6 if rich else 3.8), layout="constrained")
        grid = figure.add_gridspec(2 if rich else 1, 12)
        tokens, compute, bars = (figure.add_subplot(grid[0, i : i + 4]) for i in (0, 4, 8))
        _curves(tokens, part, "tokens", 1e6, "training tokens (millions)")
        _curves(compute, part, "flops", 1e12, "training compute (TFLOP)")
        _bars(bars, part)
        tokens.legend(fontsize=8)
        if rich:
            _passes_read(figure.add_subplot(grid[1, 0:3]), part["passes_read"])
            _norms(figure.add_subplot(grid[1, 3:6]), part["sleep"])
            _matrices(figure, grid[1, 6:12], part["sleep"])
        figure.savefig(path, dpi=130)


def _hardest(curve: dict[str, Any]) -> list[float]:
    keys = [int(k) for scores in curve["per_difficulty"] for k in scores]
    return [scores.get(str(max(keys)), np.nan) for scores in curve["per_difficulty"]]


def _curves(ax: Axes, part: dict[str, Any], x: str, unit: float, label: str) -> None:
    """Accuracy at the highest difficulty; thin: each seed, bold: their mean."""
    for name, colour in COLOURS.items():
        mine = [c for c in part["curves"] if c["label"] == name]
        if not mine:
            continue
        for curve in mine:
            ax.plot(np.array(curve[x]) / unit, _hardest(curve), color=colour, lw=0.7, alpha=0.6)
        mean = np.mean([_hardest(c) for c in mine], axis=0)
        ax.plot(np.array(mine[0][x]) / unit, mean, color=colour, lw=2.2, label=name)
    ax.axhline(part["floors"]["chance"], color="#999999", ls=":", lw=1)
    key = max(int(k) for k in part["rows"][0]["eval"]["per_difficulty"])
    ax.set(xlabel=label, ylabel=f"held-out accuracy at {part['difficulty']} = {key}", ylim=(-0.02, 1.02))


def _bars(ax: Axes, part: dict[str, Any]) -> None:
    """Accuracy per difficulty at equal training compute (transformers: tokens), with 95 % intervals."""
    shown = COLOURS | LEFT
    drawn = [r for r in part["rows"] if r["budget"] != "tokens" or r["label"] in LEFT]
    labels = [n for n in shown if any(r["label"] == n for r in drawn)]
    keys = list(part["rows"][0]["eval"]["per_difficulty"])
    width = 0.8 / len(labels)
    for i, name in enumerate(labels):
        rows = [r for r in drawn if r["label"] == name]
        stats = [mean_interval(r["eval"]["per_difficulty"][k] for r in rows) for k in keys]
        means = [m for m, _, _ in stats]
        error = np.nan_to_num([[m - max(lo, 0), min(hi, 1) - m] for m, lo, hi in stats]).T.clip(min=0)
        place = np.arange(len(keys)) + (i - (len(labels) - 1) / 2) * width
        ax.bar(place, means, width, yerr=error if len(rows) > 2 else None, color=shown[name], label=name,
               error_kw={"lw": 1.2})  # fmt: skip
    ax.axhline(part["floors"]["chance"], color="#999999", ls=":", lw=1)
    ax.set(
        xticks=range(len(keys)),
        ylabel="accuracy at the end",
        ylim=(0, 1.02),
        title="equal training compute (transformers: tokens)",
    )
    ax.set_xticklabels([f"{part['difficulty']} = {k}" for k in keys])
    ax.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)


def _passes_read(ax: Axes, by_seed: dict[str, dict[str, dict[str, float]]]) -> None:
    """Accuracy of the N = 4 models, read with 1, 2, ... passes, per hop (mean over seeds)."""
    seeds = list(by_seed.values())
    passes, hops = list(seeds[0]), list(next(iter(seeds[0].values())))
    grid = np.mean([[[s[p][k] for k in hops] for p in passes] for s in seeds], axis=0)
    ax.imshow(grid, vmin=0, vmax=1, cmap="Greens", aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    ax.set(xticks=range(len(hops)), yticks=range(len(passes)), xlabel="hops", ylabel="passes when read",
           title="trained with N = 4: hops answered per pass")  # fmt: skip
    ax.set_xticklabels(hops)
    ax.set_yticklabels(passes)


def _norms(ax: Axes, sleep: dict[str, Any]) -> None:
    """Norm of S and of its change, pass by pass through the windows."""
    x, start = [], 0
    for window in sleep["norm"]:
        x.append(np.arange(1, len(window) + 1) + start)
        start += len(window)
    for w, (norm, change) in enumerate(zip(sleep["norm"], sleep["change"], strict=True)):
        ax.plot(x[w], norm, "o-", color="#1b7837", label="norm of S" if w == 0 else None)
        ax.plot(x[w], change, "s--", color="#762a83", label="norm of its change" if w == 0 else None)
        if w:
            ax.axvline(x[w][0] - 0.5, color="#999999", ls=":", lw=1)
    ax.set(xlabel="pass (dotted: window evicted)", title="the sleep writes into S", ylim=(0, None))
    ax.legend(fontsize=8)


def _matrices(figure: Figure, place: Any, sleep: dict[str, Any]) -> None:
    """S of one head for one graph after each pass: a row of pictures per window."""
    windows = sleep["matrices"]
    limit = np.quantile(np.abs(np.array(windows)), 0.98)  # a few large entries would hide the rest
    grid = place.subgridspec(len(windows), len(windows[0]))
    for w, window in enumerate(windows):
        for n, matrix in enumerate(window):
            ax = figure.add_subplot(grid[w, n])
            ax.imshow(matrix, cmap="PRGn", vmin=-limit, vmax=limit)
            ax.set(xticks=[], yticks=[])
            if w == 0:
                ax.set_title(f"S after pass {n + 1}", fontsize=8)
            if n == 0:
                ax.set_ylabel(f"window {w + 1}", fontsize=8)
