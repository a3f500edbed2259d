"""What a recipe would cost on this machine, before anyone pays it."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lmsleep.backbones import Model, build, kind_of
from lmsleep.evaluation.cost import on_meta
from lmsleep.progress import progress
from lmsleep.recipes.recipe import Cell, Recipe
from lmsleep.tasks import batch_rng
from lmsleep.tasks.reading import read_batch
from lmsleep.training import RunConfig, choose_device, flops_per_step, training_flops
from lmsleep.training.batches import draw, in_parts
from lmsleep.training.simulated import Parts, simulate

DRAWN = 32  # samples whose tokens are counted
PROBE_SECONDS = 1.0  # so many samples that the products, not the calls, take the time
LARGE = 100_000_000  # parameters; one pass of more takes minutes to hours on a CPU


def estimate(cells: Sequence[Cell], seeds: int) -> Iterator[dict[str, Any]]:
    """Yield per cell: runs, and training steps, tokens, FLOPs and seconds of one run on this machine.

    For models of more than `LARGE` parameters on a CPU no step is taken: seconds are None. Else they are
    FLOPs at the rate of a step, forward and backward, over as many samples as take `PROBE_SECONDS`, measured
    once for cells of one model: in CPU time of one thread, which busy neighbours do not lengthen, or on the
    GPU.
    """
    # As runs side by side have it; besides, the clock of `_clock` is that of one thread.
    torch.set_num_threads(1)
    rates: dict[str, float] = {}
    made: dict[str, Model] = {}

    def shapes_of(model: Any) -> Model:
        name = repr(model)
        if name not in made:  # one that is pretrained has been loaded for it, and need not stay
            made[name] = on_meta(kind_of(model).shapes(model))
        return made[name]

    for cell in progress(iterable=_with_starts(cells), desc="cells", leave=False):
        config, train = cell.config, cell.config.train
        config, seconds = _startable(cell), None
        shapes = shapes_of(config.model) if choose_device(train.device).type == "cpu" else None
        if shapes is not None and sum(p.numel() for p in shapes.parameters()) > LARGE:
            flops = training_flops(config, partial(_played, shapes))
        else:
            flops = training_flops(config)
            # More passes of one model over one window take longer, at the rate of one.
            alike = repr((config.model, config.sleep.window, train.device))
            if alike not in rates:
                probe, took = _probe(config)
                rates[alike] = flops_per_step(probe) / took
            seconds = flops / rates[alike]
        drawn = min(train.batch_size, DRAWN)
        tokens = config.task.batch(batch_rng(0, "train", 0), drawn, "train").num_tokens / drawn
        yield {
            "cell": cell.label,
            "runs": 1 if cell.once else seeds,
            "steps": train.steps,
            "tokens": round(train.steps * train.batch_size * tokens),
            "flops": flops,
            "seconds": seconds,
        }


def _played(shapes: Model, config: RunConfig) -> int:
    """Return the FLOPs of a step of a model, found out without taking it."""
    train = replace(config.train, curriculum=0)
    batches = in_parts(draw(replace(config, train=train), 0), train.accumulate, train.batch_size)
    return simulate(Parts(shapes, bfloat16=False), batches, config.sleep, train).flops


def side_by_side(rows: Sequence[dict[str, Any]], workers: int) -> float | None:
    """Return the seconds of an estimate in so many workers: no less than those of the longest run.

    None where those of a run are not known.
    """
    if any(row["seconds"] is None for row in rows):
        return None
    total = sum(row["runs"] * row["seconds"] for row in rows)
    # Runs are not divided, so that one long run sets the pace of many workers.
    return max(total / workers, *(row["seconds"] for row in rows))


def _with_starts(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells and their starts, each once; runs that share a longer one cost nothing."""
    found: dict[str, Cell] = {}
    shared = {cell.shorter.folder_for(0) for cell in cells if cell.shorter is not None}
    for cell in cells:
        if cell.reading is not None:  # which is a run of another cell
            continue
        starts = [] if cell.start is None else _with_starts([cell.start])
        found |= {c.folder_for(0): c for c in [*starts, cell]}
    return [cell for name, cell in found.items() if name not in shared]


def _startable(cell: Cell) -> RunConfig:
    """Return a run whose model is there: of one whose folder the run before it writes, that run's."""
    config, source = cell.config, kind_of(cell.config.model).source(cell.config.model)
    if cell.start is None or source is None or source.exists():
        return config
    before: Any = cell.start.config.model
    return replace(config, model=replace(config.model, folder=before.folder, insert=before.insert))


def _probe(config: RunConfig) -> tuple[RunConfig, float]:
    """Return the run with samples enough to be timed, and the seconds of a step."""
    size, most = 1, config.train.batch_size
    # Doubled until calls no longer weigh: a small batch would be timed by the overhead of its kernels.
    while True:
        # In one part, for a batch smaller than its parts is refused.
        few = replace(config, train=replace(config.train, batch_size=size, accumulate=1))
        seconds = _timed(few)
        if seconds > PROBE_SECONDS or size == most:
            return few, seconds
        size = min(2 * size, most)


def _timed(config: RunConfig) -> float:
    """Return the seconds of one forward and backward pass: the best of three."""
    device = choose_device(config.train.device)
    model = build(config.model).to(device)
    batch = config.task.batch(batch_rng(0, "train", 0), config.train.batch_size, "train").to(device)

    def step() -> None:
        loss = read_batch(model, batch, config.sleep).loss
        assert loss is not None
        loss.backward()

    return fastest(step, device, 3)


def fastest(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the seconds of a call: the best of so many, of which the first also warms up."""
    elapsed = []
    for _ in range(repeats):
        started = _clock(device)
        call()
        elapsed.append(_clock(device) - started)
    return min(elapsed)


def _clock(device: torch.device) -> float:
    """Return seconds: of this thread on the CPU, or by the clock when the GPU has done its work."""
    if device.type == "cpu":
        return time.thread_time()
    # Kernels run behind the calls that start them.
    torch.cuda.synchronize()
    return time.perf_counter()


def estimated(recipe: Recipe, rows: Iterable[dict[str, Any]], workers: int) -> Iterator[str]:
    """Yield an estimate for a terminal, a line as soon as its row is known."""
    said = "\n".join(text for text in (recipe.title, recipe.expects, recipe.caution) if text)
    yield f"{said}\n\n"
    known = []
    for row in rows:
        known.append(row)
        took = "" if row["seconds"] is None else f"  {row['seconds'] / 60:>9,.1f} min"
        yield (
            f"{row['runs']} x {row['cell']:<24} {row['steps']:>7,} steps  {row['tokens']:>15,} tokens  "
            f"{row['flops'] / 1e12:>12,.1f} TFLOP{took}\n"
        )
    seconds = side_by_side(known, workers)
    if seconds is None:
        yield "\nfor a GPU: no step was taken to time it, for a pass of such a model takes long on this CPU\n"
    else:
        hours = seconds / 3600
        yield f"\nabout {hours:,.1f} hours on this machine, {workers} at a time, without evaluation\n"
