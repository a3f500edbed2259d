"""What a recipe is: named runs at three scales, and how their results are looked at."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from lmsleep.training import RunConfig

Scale = Literal["demo", "small", "paper"]
Panel = Literal["tokens", "flops", "difficulty", "passes", "final"]


@dataclass(frozen=True)
class Cell:
    """One line of a figure: its name, and its run (seed 0)."""

    label: str
    config: RunConfig

    def with_seed(self, seed: int) -> RunConfig:
        """The run for another seed: other initial weights and other data, the same for every cell."""
        return replace(self.config, train=replace(self.config.train, seed=seed))


@dataclass(frozen=True)
class Recipe:
    """One figure.

    Attributes:
        title: what is plotted.
        expects: what the paper reports, or the question where the paper has no such figure.
        cells: the runs at a scale.
        panels: left to right: learning curves against "tokens" or "flops", accuracy by "difficulty", by
            "passes" when read, or "final" accuracy, one bar a cell.
        read: passes to read each trained model with, besides its own.
    """

    title: str
    expects: str
    cells: Callable[[Scale], list[Cell]]
    panels: tuple[Panel, ...]
    read: tuple[int, ...] = ()
