"""What a recipe would cost on this machine, before anyone pays it."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lmsleep.backbones import build
from lmsleep.progress import progress
from lmsleep.recipes.recipe import Cell, Recipe
from lmsleep.tasks import batch_rng
from lmsleep.tasks.reading import read_batch
from lmsleep.training import RunConfig, choose_device, flops_per_step, training_flops

PROBE_SECONDS = 1.0  # so many samples that the products, not the calls, take the time


def estimate(cells: Sequence[Cell], seeds: int) -> list[dict[str, Any]]:
    """Return per cell: runs, and training steps, tokens, FLOPs and seconds of one run on this machine.

    The seconds are FLOPs at the rate of one pass, forward and backward, over as many samples as take
    `PROBE_SECONDS`: in CPU time of one thread, which busy neighbours do not lengthen, or on the GPU.
    """
    # As runs side by side have it; besides, the clock of `_clock` is that of one thread.
    torch.set_num_threads(1)
    rows = []
    for cell in progress(iterable=_with_starts(cells), desc="cells", leave=False):
        config, steps = cell.config, cell.config.train.steps
        flops = training_flops(config)
        probe, tokens, seconds = _probe(config)
        rows.append({
            "cell": cell.label,
            "runs": 1 if cell.once else seeds,
            "steps": steps,
            "tokens": round(steps * config.train.batch_size * tokens / probe.train.batch_size),
            "flops": flops,
            # By a rate, since steps with early or drawn passes cost less than the probe's.
            "seconds": flops / flops_per_step(probe) * seconds,
        })  # fmt: skip
    return rows


def side_by_side(rows: Sequence[dict[str, Any]], workers: int) -> float:
    """Return the seconds of an estimate in so many workers: no less than those of the longest run."""
    total = sum(row["runs"] * row["seconds"] for row in rows)
    # Runs are not divided, so that one long run sets the pace of many workers.
    return max(total / workers, *(row["seconds"] for row in rows))


def _with_starts(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells and their starts, each once; runs that share a longer one cost nothing."""
    found: dict[str, Cell] = {}
    shared = {cell.shorter.folder_for(0) for cell in cells if cell.shorter is not None}
    for cell in cells:
        starts = [] if cell.start is None else _with_starts([cell.start])
        found |= {c.folder_for(0): c for c in [*starts, cell]}
    return [cell for name, cell in found.items() if name not in shared]


def _probe(config: RunConfig) -> tuple[RunConfig, int, float]:
    """Return the run with samples enough to be timed, the tokens of a step, and its seconds."""
    size, most = 1, config.train.batch_size
    # Doubled until calls no longer weigh: a small batch would be timed by the overhead of its kernels.
    while True:
        # In one part, for a batch smaller than its parts is refused.
        few = replace(config, train=replace(config.train, batch_size=size, accumulate=1))
        tokens, seconds = _timed(few)
        if seconds > PROBE_SECONDS or size == most:
            return few, tokens, seconds
        size = min(2 * size, most)


def _timed(config: RunConfig) -> tuple[int, float]:
    """Return tokens and seconds of one forward and backward pass: the best of three."""
    device, elapsed = choose_device(config.train.device), []
    model = build(config.model).to(device)
    batch = config.task.batch(batch_rng(0, "train", 0), config.train.batch_size, "train").to(device)
    # The first one also warms up; the best is the least disturbed.
    for _ in range(3):
        started = _clock(device)
        loss = read_batch(model, batch, config.sleep).loss
        assert loss is not None
        loss.backward()
        elapsed.append(_clock(device) - started)
    return batch.num_tokens, min(elapsed)


def _clock(device: torch.device) -> float:
    """Return seconds: of this thread on the CPU, or by the clock when the GPU has done its work."""
    if device.type == "cpu":
        return time.thread_time()
    # Kernels run behind the calls that start them.
    torch.cuda.synchronize()
    return time.perf_counter()


def estimated(recipe: Recipe, rows: Sequence[dict[str, Any]], workers: int) -> str:
    """Return an estimate for a terminal."""
    said = "\n".join(text for text in (recipe.title, recipe.expects, recipe.caution) if text)
    lines = [
        f"{row['runs']} x {row['cell']:<24} {row['steps']:>7,} steps  {row['tokens']:>15,} tokens  "
        f"{row['flops'] / 1e12:>12,.1f} TFLOP  {row['seconds'] / 60:>9,.1f} min\n"
        for row in rows
    ]
    hours = side_by_side(rows, workers) / 3600
    end = f"about {hours:,.1f} hours on this machine, {workers} at a time, without evaluation\n"
    return f"{said}\n\n{''.join(lines)}\n{end}"
