"""The microscope's figures, from the tables of an inspection."""

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmsleep.heatmap import heat_map
from lmsleep.microscope.seen import Row, Seen

AWAKE, ASLEEP = "#1b7837", "#762a83"
SHOWN = 6  # last windows in the figure of heads
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
CURVES = {
    "norm": "norm of S",
    "change": "norm of its change",
    "effective_rank": "effective rank of S",
    "cosine_S": "cosine of S before and after",
    "cosine_change": "cosine with the change before",
    "forgotten": "share forgotten a token",
    "written": "write strength beta",
}
READ = {
    "cosine": "cosine of the value read and the value written",
    "retrieved": "retrieved (share)",
}


def figures(seen: Seen) -> dict[str, Figure]:
    """Draw all figures that there are rows for; return them by name."""
    drawn = {"hypnogram": hypnogram(seen.hypnogram), "heads": heads(seen.heads)}
    if seen.readback:
        drawn["readback"] = readback(seen.readback)
    if seen.probe:
        drawn["probe"] = probe(seen.probe)
    if seen.ablation:
        drawn["ablation"] = ablation(seen.ablation)
    return drawn


def hypnogram(rows: list[Row]) -> Figure:
    """Draw the window's fill with its sleeps, and the norm of S, along the stream."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        fill, norm = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.4])
        token = [r["token"] for r in rows]
        asleep = [r for r in rows if r["pass"] > 1]
        fill.fill_between(token, [r["fill"] for r in rows], color="#a6dba0", lw=0)
        fill.plot(token, [r["fill"] for r in rows], color=AWAKE, lw=1)
        norm.plot(token, [r["norm"] for r in rows], color=AWAKE, lw=1.2)
        norm.scatter([r["token"] for r in asleep], [r["norm"] for r in asleep], s=16, color=ASLEEP, zorder=3,
                     label="asleep")  # fmt: skip
        for place in sorted({r["token"] for r in asleep}):
            for ax in (fill, norm):
                ax.axvline(place, color=ASLEEP, ls=":", lw=0.8)
        if asleep:
            norm.legend(fontsize=8, loc="lower right")
        fill.set(ylabel="window fill (tokens)", ylim=(0, None))
        norm.set(xlabel="tokens read (dotted: a sleep)", ylabel="norm of all S", ylim=(0, None))
    return figure


def heads(rows: list[Row]) -> Figure:
    """Draw every quantity of every head, pass by pass through the last windows."""
    last = max(r["window"] for r in rows)
    # Passes of more windows would be too narrow to tell apart.
    rows = [r for r in rows if r["window"] > last - SHOWN]
    steps = sorted({(r["window"], r["pass"]) for r in rows})
    place = {step: i for i, step in enumerate(steps)}
    names = _heads(rows)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 5.6), layout="constrained")
        axes = figure.subplots(2, 4)
        colours = _colours(names)
        for ax, (column, title) in zip(axes.flat, CURVES.items(), strict=False):
            for name, colour in zip(names, colours, strict=True):
                mine = [r for r in rows if (r["block"], r["head"]) == name]
                ax.plot([place[r["window"], r["pass"]] for r in mine],
                        [np.nan if r[column] is None else r[column] for r in mine],
                        "o-", ms=3, lw=1, color=colour)  # fmt: skip
            for i, (_, n) in enumerate(steps):
                if n == 1 and i:
                    ax.axvline(i - 0.5, color="#999999", ls=":", lw=1)
            ax.set(title=title)
            _pass_ticks(ax, steps)
        axes[1, 3].axis("off")
        lines = [mpl.lines.Line2D([], [], color=c) for c in colours]
        labels = [f"block {block}, head {head}" for block, head in names]
        axes[1, 3].legend(lines[:24], labels[:24], fontsize=8, ncols=1 + len(names) // 10, loc="center")
    return figure


def _pass_ticks(ax: Axes, steps: list[tuple[int, int]]) -> None:
    # At most 24 labels fit.
    shown = range(0, len(steps), -(-len(steps) // 24))
    ax.set(xticks=list(shown), xlabel="pass (dotted: window evicted)")
    ax.set_xticklabels([str(steps[i][1]) for i in shown], fontsize=7)


def readback(rows: list[Row]) -> Figure:
    """Draw tokens of the last window against heads, after its sleep, and how retrieval fades later."""
    names = _heads(rows)
    window = max(r["window"] for r in rows)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 1.6 + 2 * max(0.9, 0.24 * len(names))), layout="constrained")
        spec = figure.add_gridspec(2, 4)
        last = [r for r in rows if r["window"] == window]
        for i, (column, title) in enumerate(READ.items()):
            ax = figure.add_subplot(spec[i, :3])
            image = _tokens_by_heads(ax, last, names, column)
            ax.set(title=f"{title}, window {window} after its sleep", ylabel="block.head")
            figure.colorbar(image, ax=ax, pad=0.01)
        _fading(figure.add_subplot(spec[:, 3]), rows, names)
    return figure


def _heads(rows: list[Row]) -> list[tuple[int, int]]:
    return sorted({(r["block"], r["head"]) for r in rows})


def _colours(names: list[tuple[int, int]]) -> Any:
    return mpl.colormaps["viridis"](np.linspace(0, 0.9, len(names)))


def _tokens_by_heads(ax: Axes, rows: list[Row], names: list[tuple[int, int]], column: str) -> Any:
    mine = [[r for r in rows if (r["block"], r["head"]) == name] for name in names]
    grid = [[r[column] for r in row] for row in mine]
    labels = [_label(r) for r in mine[0]]
    ax.set(yticks=range(len(names)), xticks=range(len(labels)))
    ax.set_yticklabels([f"{block}.{head}" for block, head in names], fontsize=7)
    ax.set_xticklabels(labels, fontsize=7 if len(labels) <= 40 else 4, rotation=90)
    return ax.imshow(grid, vmin=0, vmax=1, cmap="Greens", aspect="auto", interpolation="nearest")


def _fading(ax: Axes, rows: list[Row], names: list[tuple[int, int]]) -> None:
    windows = sorted({r["window"] for r in rows})
    age = [w - windows[-1] for w in windows]
    for name, colour in zip(names, _colours(names), strict=True):
        mine = [r for r in rows if (r["block"], r["head"]) == name]
        share = [np.mean([r["retrieved_end"] for r in mine if r["window"] == w]) for w in windows]
        ax.plot(age, share, "o-", ms=3, color=colour, label=f"{name[0]}.{name[1]}")
    ax.set(title="still retrieved at the end", xlabel="window, counted from the last", xticks=age)
    ax.set(ylim=(-0.02, 1.05))
    if len(names) <= 12:
        ax.legend(fontsize=7, frameon=False)


def _label(row: Row) -> str:
    return str(row["place"]) if row["text"] is None else repr(row["text"])[1:-1].replace("$", r"\$")


def probe(rows: list[Row]) -> Figure:
    """Draw the accuracy of the probes, pass against steps, with a panel for each of the last four windows."""
    windows = sorted({r["window"] for r in rows})[-4:]
    passes, steps = (sorted({r[key] for r in rows}) for key in ("pass", "steps"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 3.3 * len(windows), 3.4), layout="constrained")
        panels = figure.subplots(1, len(windows), squeeze=False)[0]
        for ax, window in zip(panels, windows, strict=True):
            mine = {(r["pass"], r["steps"]): r for r in rows if r["window"] == window}
            grid = np.array([[mine[n, j]["accuracy"] for j in steps] for n in passes])
            # Numbers in more cells would overlap.
            heat_map(ax, grid, ["embedding", *passes[1:]], steps, numbers=grid.size <= 150)
            constant = np.mean([r["constant"] for r in mine.values()])
            ax.set(title=f"window {window} (best constant {constant:.2f})", xlabel="steps ahead")
        panels[0].set(ylabel="h after pass")
    return figure


def ablation(rows: list[Row]) -> Figure:
    """Draw what is lost without a head, or with another sequence's."""
    labels = {"zero": "S = 0", "swap": "S of another sequence"}
    cut = [r for r in rows if r["how"] is not None]
    names = list(dict.fromkeys((r["block"], r["head"]) for r in cut))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        panels = figure.subplots(1, 2)
        columns = {"accuracy_lost": "accuracy lost", "nats_lost": "nats a token lost"}
        for ax, (column, label) in zip(panels, columns.items(), strict=True):
            for i, how in enumerate(dict.fromkeys(r["how"] for r in cut)):
                values = [r[column] for r in cut if r["how"] == how]
                place = np.arange(len(names)) + 0.4 * (i - 0.5)
                ax.bar(place, values, 0.4, color=(AWAKE, ASLEEP)[i], label=labels[how])
            ax.axhline(0, color="#999999", lw=0.8)
            ax.set(ylabel=label, xlabel="block.head", xticks=range(len(names)))
            ticks = ["all" if block is None else f"{block}.{head}" for block, head in names]
            ax.set_xticklabels(ticks, fontsize=8 if len(names) <= 24 else 5, rotation=90)
            ax.legend(fontsize=8, frameon=False)
    return figure
