"""What recipes share whose choices were searched, each at the same training FLOPs."""

from dataclasses import replace

from lmsleep.recipes.recipe import Cell
from lmsleep.recipes.settings import Scale
from lmsleep.training import RunConfig, for_flops

RATES = (0.015, 0.0075, 0.03)  # Muon's, in the order of the search
LONGER = 3  # times the training, for those that learned nothing: later, or not at all?


def paid(run: RunConfig, flops: int, curriculum: float) -> RunConfig:
    """Give a run the steps that so many FLOPs pay, and let the difficulty rise over a share of them.

    The rates rise over a tenth of the steps, 20 at most.
    """
    run = for_flops(run, flops)
    steps = run.train.steps
    train = replace(run.train, curriculum=round(curriculum * steps), warmup=min(20, steps // 10))
    return replace(run, train=train)


def trained_longer(label: str, config: RunConfig, at: int | None = None) -> Cell:
    """Return the cell of a run with `LONGER` times the FLOPs of all others: one seed, beside the frontier."""
    label = f"{label}, {LONGER} times the training"
    return Cell(label, config, at=at, line=label, once=True, aside=True)


def check_scale(scale: Scale, recipe: str, tool: str) -> None:
    """Refuse a scale at which nothing was searched.

    Raises:
        ValueError: naming the tool that searches.
    """
    if scale != "demo":
        raise ValueError(
            f"{recipe} at scale={scale}: its rates were searched at the demo's size alone; use scale=demo, "
            f"and {tool} to search at another"
        )
