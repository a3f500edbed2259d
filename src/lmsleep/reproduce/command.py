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

from lmsleep.backbones import build, kind_of
from lmsleep.files import write_atomic
from lmsleep.reproduce.figure import draw
from lmsleep.reproduce.recipe import Cell, Recipe, Scale
from lmsleep.reproduce.recipes import RECIPES
from lmsleep.reproduce.results import Row, collect, table, time_steps, write_data
from lmsleep.tasks import batch_rng
from lmsleep.tasks.reading import read_batch
from lmsleep.training import (
    Job,
    RunConfig,
    RunFolder,
    choose_device,
    default_workers,
    flops_per_step,
    provenance,
    run_all,
    training_flops,
)

FEW = 8  # samples in a batch of a run that only tries the mechanics
PROBE_SECONDS = 1.0  # so many samples that the products, not the calls, take the time


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Train the runs behind a figure and write its data, table and picture.

    Stop it when you like: the same command goes on where it was.
    """

    figure: Positional[Literal[tuple(RECIPES)]]  # type: ignore[valid-type]
    """2a to 6: figures of the paper; the others are comparisons it left out (lmsleep reproduce --help)."""
    scale: Scale = "demo"
    """demo: minutes a seed on two cores; small: hours; paper: the paper's own setting, for a GPU."""
    weights: Path | None = None
    """Figures 4a, 4b and 5 at the scales small and paper: the folder of the pretrained model."""
    seeds: int | None = None
    """Seeds 0 ... K - 1; default one for a first look at the scale demo, three otherwise."""
    out: Path | None = None
    """Folder for results; default results/FIGURE-SCALE. The runs go to runs/reproduce/FIGURE-SCALE."""
    workers: int | None = None
    """Runs at a time; default one for each GPU, or without one for each core."""
    dry_run: bool = False
    """Say what would be trained, and for how long, instead of doing it."""
    steps: int | None = None
    """Train every run for so many steps of few samples instead, and evaluate on little, in folders of its own
    (to try the mechanics)."""
    json: bool = False
    """Print one JSON document instead of a table."""


def run(options: ReproduceOptions) -> None:
    """Train (or time), collect, write, report."""
    seeds = default_seeds(options.scale) if options.seeds is None else options.seeds
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    recipe, name = RECIPES[options.figure], f"{options.figure}-{options.scale}"
    if options.weights is None:
        cells = recipe.cells(options.scale)
    else:
        recipe, cells = _with_weights(recipe, options.scale, options.weights)
        name += f"-{options.weights.resolve().name}"
    if options.steps is not None:
        name += f"-{options.steps}-steps"
        cells = [_shortened(cell, options.steps) for cell in cells]
    if options.dry_run:
        torch.set_num_threads(1)
        _report(options, recipe, estimate(cells, seeds))
        return
    curves: list[Row] = []
    if recipe.value == "tokens_per_second":
        rows, made = time_steps(cells, seeds), [provenance()]
    else:
        jobs = _train(cells, seeds, options.workers, Path("runs/reproduce") / name)
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


def default_seeds(scale: Scale) -> int:
    """One for a first look, else three."""
    return 1 if scale == "demo" else 3


def _with_weights(recipe: Recipe, scale: Scale, weights: Path) -> tuple[Recipe, list[Cell]]:
    """The recipe for a pretrained model, and its cells."""
    if recipe.fine_tuned is None:
        raise ValueError("weights: only figures 4a, 4b and 5 begin with a pretrained model")
    if not weights.is_dir():
        raise FileNotFoundError(f"weights: there is no folder {weights}; nothing is downloaded")
    caution = f"Fine-tuned from `{weights.resolve().name}`."
    if scale == "small":
        caution += " Adapters on shorter problems than the paper's, with fewer operations; nothing is tuned."
    return replace(recipe, caution=caution), recipe.fine_tuned(scale, weights)


def _train(cells: Sequence[Cell], seeds: int, workers: int | None, folder: Path) -> list[tuple[Cell, Job]]:
    """The finished run of every cell and seed; those that others start from go first."""
    chains = [(cell, _chain(cell, seed, folder)) for seed in range(seeds) for cell in cells]
    for stage in range(max(len(chain) for _, chain in chains)):
        due = {chain[stage].path: chain[stage] for _, chain in chains if stage < len(chain)}
        run_all([*due.values()], workers)
    return [(cell, chain[-1]) for cell, chain in chains]


def _chain(cell: Cell, seed: int, folder: Path) -> list[Job]:
    """The run of a cell, after those that it starts from."""
    before = [] if cell.start is None else _chain(cell.start, seed, folder)
    config = cell.with_seed(seed)
    if before and kind_of(config.model).source(config.model) is not None:
        model = replace(config.model, folder=RunFolder(before[-1].path).exported.resolve())
        config = replace(config, model=model)
    elif before:
        config = replace(config, train=replace(config.train, start=before[-1].path))
    return [*before, Job(folder / f"{_slug(cell.label)}-seed{seed}", config)]


def estimate(cells: Sequence[Cell], seeds: int) -> list[dict[str, Any]]:
    """Per cell: runs, and training steps, tokens, FLOPs and seconds of one run on this machine.

    The seconds are FLOPs at the rate of one pass, forward and backward, over as many samples as take
    `PROBE_SECONDS`: in CPU time of one thread, which busy neighbours do not lengthen, or on the GPU.
    """
    rows = []
    for cell in _with_starts(cells):
        config, steps = cell.config, cell.config.train.steps
        flops = training_flops(config)
        probe, tokens, seconds = _probe(config)
        rows.append({
            "cell": cell.label,
            "runs": seeds,
            "steps": steps,
            "tokens": round(steps * config.train.batch_size * tokens / probe.train.batch_size),
            "flops": flops,
            "seconds": flops / flops_per_step(probe) * seconds,
        })  # fmt: skip
    return rows


def side_by_side(rows: Sequence[dict[str, Any]], workers: int) -> float:
    """Seconds that the runs of an estimate take in so many workers: no less than the longest of them."""
    total = sum(row["runs"] * row["seconds"] for row in rows)
    return max(total / workers, *(row["seconds"] for row in rows))


def _with_starts(cells: Sequence[Cell]) -> list[Cell]:
    """The cells and those that they start from, each once."""
    found: dict[str, Cell] = {}
    for cell in cells:
        starts = [] if cell.start is None else _with_starts([cell.start])
        found |= {c.label: c for c in [*starts, cell]}
    return [*found.values()]


def _probe(config: RunConfig) -> tuple[RunConfig, int, float]:
    """The run with as many samples a step as take long enough, the tokens of a step, and its seconds."""
    size, most = 1, config.train.batch_size
    while True:
        few = replace(config, train=replace(config.train, batch_size=size, accumulate=1))
        tokens, seconds = _timed(few)
        if seconds > PROBE_SECONDS or size == most:
            return few, tokens, seconds
        size = min(2 * size, most)


def _timed(config: RunConfig) -> tuple[int, float]:
    """Tokens and seconds of one forward and backward pass: the best of three."""
    device, elapsed = choose_device(config.train.device), []
    model = build(config.model).to(device)
    batch = config.task.batch(batch_rng(0, "train", 0), config.train.batch_size, "train").to(device)
    for _ in range(3):
        started = _clock(device)
        loss = read_batch(model, batch, config.sleep).loss
        assert loss is not None
        loss.backward()
        elapsed.append(_clock(device) - started)
    return batch.num_tokens, min(elapsed)


def _clock(device: torch.device) -> float:
    """Seconds: of this thread on the CPU, or by the clock when the GPU has done its work."""
    if device.type == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _report(options: ReproduceOptions, recipe: Recipe, rows: list[dict[str, Any]]) -> None:
    if options.json:
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    said = "\n".join(text for text in (recipe.title, recipe.expects, recipe.caution) if text)
    sys.stdout.write(f"{said}\n\n")
    for row in rows:
        sys.stdout.write(
            f"{row['runs']} x {row['cell']:<24} {row['steps']:>7,} steps  {row['tokens']:>15,} tokens  "
            f"{row['flops'] / 1e12:>12,.1f} TFLOP  {row['seconds'] / 60:>9,.1f} min\n"
        )
    workers = options.workers or default_workers()
    hours = side_by_side(rows, workers) / 3600
    sys.stdout.write(f"\nabout {hours:,.1f} hours on this machine, {workers} at a time, without evaluation\n")


def _shortened(cell: Cell, steps: int) -> Cell:
    train = cell.config.train
    size, rise = min(train.batch_size, FEW), min(train.curriculum, steps)
    few = replace(train, steps=steps, batch_size=size, curriculum=rise, eval_batches=1)
    start = None if cell.start is None else _shortened(cell.start, steps)
    return replace(cell, config=replace(cell.config, train=few), start=start)


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label).strip("-")


def _made_by(made: Sequence[dict[str, Any]]) -> str:
    """This command, and where its runs were made (perhaps by several, if it was stopped in between)."""
    where = {f"{m['hardware']}, torch {m['torch']}, commit {m['commit']}": None for m in made}
    return f"`{provenance()['command']}`, {'; '.join(where)}"
