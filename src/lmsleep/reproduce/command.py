"""`lmsleep reproduce`: train the runs of a recipe, then write its data, table and figure."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tyro.conf import Positional

from lmsleep.evaluation import read_batch
from lmsleep.files import write_atomic
from lmsleep.models import HybridLM
from lmsleep.reproduce import results
from lmsleep.reproduce.recipe import Cell, Scale
from lmsleep.reproduce.recipes import RECIPES
from lmsleep.tasks import stream
from lmsleep.training import Job, RunConfig, RunFolder, flops_per_step, run_all

PROBE_SECONDS = 0.5  # a step this long is timed well enough


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Train the runs behind a figure and write its data, table and picture.

    Stop it when you like: the same command goes on where it was.
    """

    figure: Positional[Literal[tuple(RECIPES)]]  # type: ignore[valid-type]
    """2a, 2b, 3: figures of the paper; the others are comparisons it left out (lmsleep reproduce --help)."""
    scale: Scale = "demo"
    """demo: minutes on two cores; small: hours; paper: the paper's own setting, for a GPU."""
    seeds: int = 3
    """Seeds 0 ... K - 1."""
    out: Path | None = None
    """Folder for results; default results/FIGURE-SCALE. The runs go to runs/reproduce/FIGURE-SCALE."""
    workers: int | None = None
    """Runs at a time; default one per core."""
    dry_run: bool = False
    """Say what would be trained, and for how long, instead of doing it."""
    steps: int | None = None
    """Train every run for so many steps instead (to try the mechanics)."""
    json: bool = False
    """Print one JSON document instead of a table."""


def run(options: ReproduceOptions) -> None:
    """Train, collect, write, report."""
    if options.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {options.seeds}")
    recipe, name = RECIPES[options.figure], f"{options.figure}-{options.scale}"
    cells = recipe.cells(options.scale)
    if options.steps is not None:
        cells = [Cell(c.label, _shortened(c.config, options.steps)) for c in cells]
    if options.dry_run:
        _report(options, estimate(cells, options.seeds))
        return
    jobs = []
    for seed in range(options.seeds):
        for cell in cells:
            path = Path("runs/reproduce") / name / f"{_slug(cell.label)}-seed{seed}"
            jobs.append((cell.label, Job(path, cell.with_seed(seed))))
    run_all([job for _, job in jobs], options.workers)
    out = options.out or Path("results") / name
    out.mkdir(parents=True, exist_ok=True)
    rows, curves = results.collect(recipe, jobs)
    task = cells[0].config.task
    text = results.table(recipe, rows, task.difficulty_name, task.floors())
    text += f"\n{_made_by(jobs[0][1].path)}\n"
    results.write_data(out, rows, curves)
    figure = results.draw(recipe, rows, curves, task.difficulty_name, task.floors()["chance"])
    figure.savefig(out / "figure.png", dpi=130)
    write_atomic(out / "README.md", (text + "\n![figure](figure.png)\n").encode())
    sys.stdout.write(json.dumps(rows) + "\n" if options.json else f"{text}\n{out / 'README.md'}\n")


def estimate(cells: Sequence[Cell], seeds: int) -> list[dict[str, Any]]:
    """Per cell: runs, training tokens and FLOPs of one, and seconds for one on this machine.

    All are those of one step over as many rows as take half a second, times rows and steps.
    """
    rows = []
    for cell in cells:
        train, probe, seconds = cell.config.train, 1, 0.0
        while True:
            few = replace(cell.config, train=replace(train, batch_size=probe))
            seconds = _seconds(few)
            if seconds > PROBE_SECONDS or probe == train.batch_size:
                break
            probe = min(2 * probe, train.batch_size)
        times = train.steps * train.batch_size / probe
        batch = few.task.batch(stream(0, "train", 0), probe, "train")
        rows.append({
            "cell": cell.label,
            "runs": seeds,
            "steps": train.steps,
            "tokens": round(times * batch.num_tokens),
            "flops": round(times * flops_per_step(few)),
            "seconds": times * seconds,
        })  # fmt: skip
    return rows


def _seconds(config: RunConfig) -> float:
    """Of one forward and backward pass: the best of three."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    model, elapsed = HybridLM(config.model), []
    batch = config.task.batch(stream(0, "train", 0), config.train.batch_size, "train")
    for _ in range(3):
        started = time.perf_counter()
        loss = read_batch(model, batch, config.sleep).loss
        assert loss is not None
        loss.backward()
        elapsed.append(time.perf_counter() - started)
    return min(elapsed)


def _report(options: ReproduceOptions, rows: list[dict[str, Any]]) -> None:
    if options.json:
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    sys.stdout.write(f"{RECIPES[options.figure].title}\n{RECIPES[options.figure].expects}\n\n")
    for row in rows:
        sys.stdout.write(
            f"{row['runs']} x {row['cell']:<24} {row['steps']:>7,} steps  {row['tokens']:>15,} tokens  "
            f"{row['flops'] / 1e12:>12,.1f} TFLOP  {row['seconds'] / 60:>9,.1f} min\n"
        )
    total = sum(row["runs"] * row["seconds"] for row in rows) / 3600
    sys.stdout.write(f"\nabout {total:,.1f} hours of one process on this machine, evaluation not counted\n")


def _shortened(config: RunConfig, steps: int) -> RunConfig:
    train = config.train
    return replace(config, train=replace(train, steps=steps, curriculum=min(train.curriculum, steps)))


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label).strip("-")


def _made_by(path: Path) -> str:
    made = RunFolder.open(path).made_by()
    return f"`{made['command']}`, {made['hardware']}, torch {made['torch']}, commit {made['commit']}"
