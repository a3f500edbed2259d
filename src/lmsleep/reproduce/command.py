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
from lmsleep.reproduce.figure import draw
from lmsleep.reproduce.recipe import Cell, Scale
from lmsleep.reproduce.recipes import RECIPES
from lmsleep.reproduce.results import Row, collect, table, time_steps, write_data
from lmsleep.tasks import stream
from lmsleep.training import Job, RunConfig, RunFolder, choose_device, flops_per_step, provenance, run_all

PROBE_SECONDS = 0.5  # a step this long is timed well enough


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Train the runs behind a figure and write its data, table and picture.

    Stop it when you like: the same command goes on where it was.
    """

    figure: Positional[Literal[tuple(RECIPES)]]  # type: ignore[valid-type]
    """2a to 6: figures of the paper; the others are comparisons it left out (lmsleep reproduce --help)."""
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
    """Train every run for so many steps instead and evaluate on little, in folders of its own (to try the
    mechanics)."""
    json: bool = False
    """Print one JSON document instead of a table."""


def run(options: ReproduceOptions) -> None:
    """Train (or time), collect, write, report."""
    if options.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {options.seeds}")
    recipe, name = RECIPES[options.figure], f"{options.figure}-{options.scale}"
    cells = recipe.cells(options.scale)
    if options.steps is not None:
        name += f"-{options.steps}-steps"
        cells = [_shortened(cell, options.steps) for cell in cells]
    if options.dry_run:
        _report(options, estimate(cells, options.seeds))
        return
    curves: list[Row] = []
    if recipe.value == "tokens_per_second":
        rows, made = time_steps(cells, options.seeds), [provenance()]
    else:
        jobs = _train(cells, options, Path("runs/reproduce") / name)
        rows, curves = collect(recipe, jobs)
        made = [RunFolder.open(job.path).made_by() for _, job in jobs]
    difficulty = cells[0].config.task.difficulty_name
    text = f"{table(recipe, rows, difficulty)}\n{_made_by(made)}\n"
    out = options.out or Path("results") / name
    out.mkdir(parents=True, exist_ok=True)
    write_data(out, rows, curves)
    draw(recipe, rows, curves, difficulty).savefig(out / "figure.png", dpi=130)
    write_atomic(out / "README.md", (text + "\n![figure](figure.png)\n").encode())
    sys.stdout.write(json.dumps(rows) + "\n" if options.json else f"{text}\n{out / 'README.md'}\n")


def _train(cells: Sequence[Cell], options: ReproduceOptions, folder: Path) -> list[tuple[Cell, Job]]:
    """The finished run of every cell and seed; those that others start from go first."""
    chains = [(cell, _chain(cell, seed, folder)) for seed in range(options.seeds) for cell in cells]
    for stage in range(max(len(chain) for _, chain in chains)):
        due = {chain[stage].path: chain[stage] for _, chain in chains if stage < len(chain)}
        run_all([*due.values()], options.workers)
    return [(cell, chain[-1]) for cell, chain in chains]


def _chain(cell: Cell, seed: int, folder: Path) -> list[Job]:
    """The run of a cell, after those that it starts from."""
    before = [] if cell.start is None else _chain(cell.start, seed, folder)
    config = cell.with_seed(seed)
    if before:
        config = replace(config, train=replace(config.train, start=before[-1].path))
    return [*before, Job(folder / f"{_slug(cell.label)}-seed{seed}", config)]


def estimate(cells: Sequence[Cell], seeds: int) -> list[dict[str, Any]]:
    """Per cell: runs, training tokens and FLOPs of one, and seconds for one on this machine.

    All are those of one step over as many rows as take half a second, times rows and steps.
    """
    rows = []
    for cell in _with_starts(cells):
        train, probe, seconds = cell.config.train, 1, 0.0
        while True:
            few = replace(cell.config, train=replace(train, batch_size=probe, accumulate=1))
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


def _with_starts(cells: Sequence[Cell]) -> list[Cell]:
    """The cells and those that they start from, each once."""
    found: dict[str, Cell] = {}
    for cell in cells:
        starts = [] if cell.start is None else _with_starts([cell.start])
        found |= {c.label: c for c in [*starts, cell]}
    return [*found.values()]


def _seconds(config: RunConfig) -> float:
    """Of one forward and backward pass where the run would be trained: the best of three."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device, elapsed = choose_device(config.train.device), []
    model = HybridLM(config.model).to(device)
    batch = config.task.batch(stream(0, "train", 0), config.train.batch_size, "train").to(device)
    for _ in range(3):
        started = time.perf_counter()
        loss = read_batch(model, batch, config.sleep).loss
        assert loss is not None
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        elapsed.append(time.perf_counter() - started)
    return min(elapsed)


def _report(options: ReproduceOptions, rows: list[dict[str, Any]]) -> None:
    if options.json:
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    recipe = RECIPES[options.figure]
    said = "\n".join(text for text in (recipe.title, recipe.expects, recipe.caution) if text)
    sys.stdout.write(f"{said}\n\n")
    for row in rows:
        sys.stdout.write(
            f"{row['runs']} x {row['cell']:<24} {row['steps']:>7,} steps  {row['tokens']:>15,} tokens  "
            f"{row['flops'] / 1e12:>12,.1f} TFLOP  {row['seconds'] / 60:>9,.1f} min\n"
        )
    total = sum(row["runs"] * row["seconds"] for row in rows) / 3600
    sys.stdout.write(f"\nabout {total:,.1f} hours of one process on this machine, evaluation not counted\n")


def _shortened(cell: Cell, steps: int) -> Cell:
    train = cell.config.train
    few = replace(train, steps=steps, curriculum=min(train.curriculum, steps), eval_batches=1)
    start = None if cell.start is None else _shortened(cell.start, steps)
    return replace(cell, config=replace(cell.config, train=few), start=start)


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label).strip("-")


def _made_by(made: Sequence[dict[str, Any]]) -> str:
    """This command, and where its runs were made (perhaps by several, if it was stopped in between)."""
    where = {f"{m['hardware']}, torch {m['torch']}, commit {m['commit']}": None for m in made}
    return f"`{provenance()['command']}`, {'; '.join(where)}"
