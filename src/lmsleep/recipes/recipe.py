"""What a recipe is: named runs at three scales, and how their results are looked at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lmsleep.recipes.settings import Scale
from lmsleep.sleep import SleepConfig
from lmsleep.training import RunConfig, TrainConfig

Budget = Literal["tokens", "compute", "both"]
Panel = Literal[
    "tokens", "flops", "loss", "difficulty", "axis", "final", "grid", "read",
    "bytes", "context_flops", "token_flops", "token_seconds", "parameters",
]  # fmt: skip
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
        budget: what its run has in common with the run it is compared with, where a recipe holds both.
        shorter: the cell whose run makes the same first steps and leaves early; it is not trained by itself.
        folder: the name of its run's folder, before the seed; by default made from the label.
        once: whether one seed tells enough.
        reading: how the trained run sleeps when it answers; by default as in training.
        aside: whether it had another budget than all others, and stands beside the frontier.
    """

    label: str
    config: RunConfig
    at: int | None = None
    start: "Cell | None" = None
    line: str | None = None
    budget: Budget | None = None
    shorter: "Cell | None" = None
    folder: str | None = None
    once: bool = False
    reading: SleepConfig | None = None
    aside: bool = False

    def with_seed(self, seed: int) -> RunConfig:
        """Return the run for another seed: other initial weights and other data, the same for every cell."""
        return replace(self.config, train=replace(self.config.train, seed=seed))

    def with_train(self, change: Callable[[TrainConfig], TrainConfig]) -> "Cell":
        """Change the options of training, also of the cells that this run begins with or shares."""
        # They must change alike: a shorter run may differ in its steps alone.
        start, shorter = (each and each.with_train(change) for each in (self.start, self.shorter))
        config = replace(self.config, train=change(self.config.train))
        return replace(self, config=config, start=start, shorter=shorter)

    def folder_for(self, seed: int) -> str:
        """Return the name of the folder of the run with that seed."""
        # Labels have spaces and signs that a shell or a file system might mind.
        slug = "".join(c if c.isalnum() else "-" for c in self.label).strip("-")
        return f"{self.folder or slug}-seed{seed}"


@dataclass(frozen=True)
class Recipe:
    """One figure.

    Attributes:
        title: what is plotted.
        expects: what the paper reports, or the question where the paper has no such figure.
        cells: the runs at a scale; raises ValueError where a scale needs what is not at hand.
        panels: left to right: learning curves against "tokens" or "flops", of the test "loss" against steps;
            the value by "difficulty", along
            the "axis", or at the end ("final", a bar each); heat maps: the "grid" of axis by difficulty, one
            for each N, and how the largest N answers when it is "read" with other passes; or against
            what a run keeps and costs when it is used (of `recipes.costs`), with the frontier.
        shown: difficulties whose frontiers are drawn; by default the easiest and the hardest.
        axis: what the axis counts.
        read: the ways a trained run is read, by their place on the axis; by default its own.
        value: what is measured: accuracy after training, or the speed of a few training steps.
        together: names of sets of difficulties, which are then taken together; by default each stands alone.
        costs: whether what a run keeps and costs when it is used is measured too (`recipes.costs`).
        caution: what must be said with every result.
        fine_tuned: the runs from the pretrained weights in a folder; raises ValueError for scales other
            than its own.
    """

    title: str
    expects: str
    cells: Callable[[Scale], list[Cell]]
    panels: tuple[Panel, ...]
    shown: tuple[int, ...] = ()
    axis: str | None = None
    read: Callable[[RunConfig], dict[int, RunConfig]] | None = None
    value: Value = "accuracy"
    together: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    costs: bool = False
    caution: str = ""
    fine_tuned: Callable[[Scale, Path], list[Cell]] | None = None
