"""What a recipe is: named runs at three scales, and how their results are looked at."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lmsleep.training import RunConfig

Scale = Literal["demo", "small", "paper"]
Panel = Literal["tokens", "flops", "difficulty", "axis", "final", "grid"]
Value = Literal["accuracy", "tokens_per_second"]


@dataclass(frozen=True)
class Cell:
    """One line of a figure, or one point of a line.

    Attributes:
        label: its name.
        config: its run, for seed 0.
        at: its place on the recipe's axis, if cells make that axis.
        start: the run whose weights it begins with.
        line: the line that it is a point of; its own by default.
    """

    label: str
    config: RunConfig
    at: int | None = None
    start: "Cell | None" = None
    line: str | None = None

    def with_seed(self, seed: int) -> RunConfig:
        """The run for another seed: other initial weights and other data, the same for every cell."""
        return replace(self.config, train=replace(self.config.train, seed=seed))


@dataclass(frozen=True)
class Recipe:
    """One figure.

    Attributes:
        title: what is plotted.
        expects: what the paper reports, or the question where the paper has no such figure.
        cells: the runs at a scale; raises ValueError where a scale needs what is not at hand.
        panels: left to right: learning curves against "tokens" or "flops", the value by "difficulty", along
            the "axis", or at the end ("final", a bar each); "grid": a heat map of axis by difficulty, per N.
        axis: what the axis counts.
        read: the ways a trained run is read, by their place on the axis; by default its own.
        value: what is measured: accuracy after training, or the speed of a few training steps.
        caution: what must be said with every result.
        fine_tuned: the runs from the pretrained weights in a folder; raises ValueError for the scale "demo".
    """

    title: str
    expects: str
    cells: Callable[[Scale], list[Cell]]
    panels: tuple[Panel, ...]
    axis: str | None = None
    read: Callable[[RunConfig], dict[int, RunConfig]] | None = None
    value: Value = "accuracy"
    caution: str = ""
    fine_tuned: Callable[[Scale, Path], list[Cell]] | None = None
