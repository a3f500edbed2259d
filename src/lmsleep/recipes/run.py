"""`lmsleep reproduce`: train the runs of a recipe, then write its data, table and figure."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lmsleep.backbones import kind_of
from lmsleep.files import check_folder
from lmsleep.launched import rank, several
from lmsleep.plain import to_json
from lmsleep.recipes import figure
from lmsleep.recipes.catalogue import GROUPS, RECIPES
from lmsleep.recipes.estimate import estimate, estimated
from lmsleep.recipes.grid import GridOptions
from lmsleep.recipes.recipe import Cell, Recipe
from lmsleep.recipes.results import Result, collect, time_steps
from lmsleep.recipes.settings import Scale
from lmsleep.training import Job, Launcher, RunFolder, TrainConfig, default_workers, run_all

FEW = 8  # samples in a batch of a run that only tries the mechanics


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(GridOptions):
    """Train the runs behind a figure and write its data, table and picture.

    Stop it when you like: the same command goes on where it was.
    """

    figure: Positional[Literal[(*RECIPES, *GROUPS)]]  # type: ignore[valid-type]
    """2a to 6: figures of the paper; the others are comparisons it left out (lmsleep reproduce --help). A
    group (rivals) is its figures, one after the other."""
    scale: Scale = "demo"
    """demo: minutes a seed on two cores; small: hours; paper: the paper's own setting, for a GPU."""
    weights: Path | None = None
    """Figures 4a, 4b and 5 at the scales small and paper, and recall: the folder of the pretrained model."""
    seeds: int | None = None
    """Seeds 0 ... K - 1; default one for a first look at the scale demo, three otherwise."""
    out: Path | None = None
    """Folder for results; default results/FIGURE-SCALE. The runs go to runs/reproduce/FIGURE-SCALE."""
    dry_run: bool = False
    """Say what would be trained, and for how long, instead of doing it."""
    steps: int | None = None
    """Train every run for so many steps of few samples instead, and evaluate on little, in folders of its own
    (to try the mechanics)."""
    json: bool = False
    """Print one JSON document instead of a table (of a group one for each figure)."""


def run(options: ReproduceOptions) -> None:
    """Train (or time) the runs of a figure, or of each in a group; collect, write and report."""
    if options.figure in GROUPS:
        each = [
            replace(options, figure=name, out=options.out and options.out / name)
            for name in GROUPS[options.figure]
        ]
        for one in each:
            check_folder(one.out or Path("results"), "out")  # of all, before the hours of the first
        for one in each:
            run(one)
        return
    seeds = default_seeds(options.scale) if options.seeds is None else options.seeds
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    launcher = options.found()
    recipe, name = RECIPES[options.figure], f"{options.figure}-{options.scale}"
    if recipe.value == "tokens_per_second" and several():
        raise ValueError(f"figure {options.figure} is timed in one process: leave out torchrun")
    if recipe.value == "tokens_per_second" and (options.workers is not None or options.launcher != "local"):
        given = "launcher" if options.workers is None else "workers"
        raise ValueError(f"{given}: figure {options.figure} is timed in one process; leave it out")
    if options.weights is None:
        cells = recipe.cells(options.scale)
    else:
        recipe, cells = _with_weights(recipe, options.scale, options.weights)
        name += f"-{_called(options.weights)}"
    if options.steps is not None:
        # Folders of their own: a try-out must not be taken for a result, or gone on with.
        name += f"-{options.steps}-steps"
        cells = [cell.with_train(partial(_few, steps=options.steps)) for cell in cells]
    out = options.out or Path("results") / name
    # Before the work of hours.
    check_folder(out, "out")
    if options.dry_run:
        rows = estimate(cells, seeds)
        workers = default_workers() if options.workers is None else options.workers
        lines = [to_json([*rows], indent=None) + "\n"] if options.json else estimated(recipe, rows, workers)
        for line in lines:
            sys.stdout.write(line)
            # A line may take a while; one wants to see it before the next.
            sys.stdout.flush()
        return
    if recipe.value == "tokens_per_second":
        result = time_steps(recipe, cells, seeds)
    else:
        folder = Path("runs/reproduce") / name
        result = train(recipe, cells, range(seeds), folder, options.workers, launcher)
    # Of several processes one writes.
    if not rank():
        result.save(out)
        figure.save(result, out / "figure.png")
    said = to_json(result.rows, indent=None) if options.json else f"{result.page()}\n{out / 'README.md'}"
    sys.stdout.write(f"{said}\n")


def default_seeds(scale: Scale) -> int:
    """Return one for a first look, else three."""
    return 1 if scale == "demo" else 3


def _with_weights(recipe: Recipe, scale: Scale, weights: Path) -> tuple[Recipe, list[Cell]]:
    """Return the recipe for a pretrained model, and its cells."""
    if recipe.fine_tuned is None:
        raise ValueError("weights: only figures 4a, 4b, 5 and recall begin with a pretrained model")
    if not weights.is_dir():
        raise FileNotFoundError(f"weights: there is no folder {weights}; nothing is downloaded")
    caution = f"Fine-tuned from `{_called(weights)}`."
    if scale == "small":
        caution += " Adapters on shorter problems than the paper's, with fewer operations; nothing is tuned."
    return replace(recipe, caution=caution), recipe.fine_tuned(scale, weights)


def _called(weights: Path) -> str:
    """Return the name of a folder of weights; of what a run exports, that of the run."""
    folder = weights.resolve()
    return folder.parent.name if folder == RunFolder(folder.parent).exported else folder.name


def train(
    recipe: Recipe,
    cells: Sequence[Cell],
    seeds: Sequence[int],
    folder: Path,
    workers: int | None,
    launcher: Launcher,
) -> Result:
    """Train what is not trained yet, runs that others start from first, and collect the result."""
    chains = [
        (cell, _chain(cell, seed, folder))
        for seed in seeds
        for cell in cells
        if seed == seeds[0] or not cell.once
    ]
    # A run that a longer one shares its start with is trained on the way.
    shared = {job.shorter.path for _, chain in chains for job in chain if job.shorter is not None}
    for stage in range(max(len(chain) for _, chain in chains)):
        # Stage by stage, for a run needs the weights of the one before; by path, for cells may share a start.
        due = {chain[stage].path: chain[stage] for _, chain in chains if stage < len(chain)}
        run_all([job for path, job in due.items() if path not in shared], workers, launcher)
    return collect(recipe, [(cell, chain[-1]) for cell, chain in chains])


def _chain(cell: Cell, seed: int, folder: Path) -> list[Job]:
    """Return the run of a cell, after those that it starts from."""
    before = [] if cell.start is None else _chain(cell.start, seed, folder)
    config = cell.with_seed(seed)
    if before and kind_of(config.model).source(config.model) is not None:
        # A pretrained model starts from what the run before exports, all others from its checkpoint.
        model = replace(config.model, folder=RunFolder(before[-1].path).exported.resolve())
        config = replace(config, model=model)
    elif before:
        config = replace(config, train=replace(config.train, start=before[-1].path))
    shorter = None if cell.shorter is None else _chain(cell.shorter, seed, folder)[-1]
    return [*before, Job(folder / cell.folder_for(seed), config, shorter)]


def _few(train: TrainConfig, steps: int) -> TrainConfig:
    """Return the training with few steps of few samples, evaluated on little."""
    # A curriculum longer than the run would never reach the hardest questions.
    size, rise = min(train.batch_size, FEW), min(train.curriculum, steps)
    return replace(train, steps=steps, batch_size=size, curriculum=rise, eval_batches=1)
