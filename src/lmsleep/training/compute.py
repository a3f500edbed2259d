"""FLOPs of training, counted by PyTorch's counter on real passes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from lmsleep.backbones import build
from lmsleep.flops import flop_counter
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Batch
from lmsleep.training.batches import draw
from lmsleep.training.config import RunConfig
from lmsleep.training.objective import Objective

COUNTED = 3  # shapes of a run, for each N; a count costs as much as several steps


def count_flops(objective: Objective, batch: Batch, sleep: SleepConfig) -> int:
    """Return the FLOPs of a forward and backward pass over a batch; gradients are dropped."""
    with flop_counter() as counter:
        loss = objective(batch, sleep)
        # A batch that predicts nothing has a loss without a graph.
        if loss.requires_grad:
            loss.backward()
    # Counting happens between steps: what it left on the parameters would be added to the next gradient.
    objective.zero_grad()
    return counter.get_total_flops()


class StepFlops:
    """FLOPs of the steps of a run, counted for the first `COUNTED` shapes of a batch that there are.

    They are counted in a pass of its own: under the counter PyTorch picks other kernels, and a run must not
    round differently in the step where it happens to count. Padding counts, and rows of other lengths count
    like those of the first batch of their shape. Texts come in ever other shapes: further ones count by their
    positions, as those that were counted do on average.

    Attributes:
        counted: the shapes of contexts and rows that were counted, N, and their FLOPs; plain data, for a run
            that goes on must count as if it had not stopped.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.counted: list[tuple[list[int], list[int], int, int]] = []

    def __call__(self, batch: Batch, sleep: SleepConfig) -> int:
        """Return the FLOPs of a forward and backward pass over a batch of this shape."""
        context = [] if batch.context is None else list(batch.context.shape)
        rows = list(batch.tokens.shape)
        # The passes of a step can be drawn, and cost in proportion.
        alike = [(tuple(c), tuple(r), flops) for c, r, n, flops in self.counted if n == sleep.passes]
        for c, r, flops in alike:
            if (list(c), list(r)) == (context, rows):
                return flops
        if len(alike) < COUNTED:
            flops = count_flops(self.objective, batch, sleep)
            self.counted.append((context, rows, sleep.passes, flops))
            return flops
        positions = sum(_positions(c, r) for c, r, _ in alike)
        return sum(flops for _, _, flops in alike) * _positions(context, rows) // positions


def _positions(context: Sequence[int], rows: Sequence[int]) -> int:
    return (math.prod(context) if context else 0) + math.prod(rows)


def flops_per_step(config: RunConfig) -> int:
    """Count the FLOPs of forward and backward pass of one training step (its first batch, all N passes).

    Samples without padding cost the same, so one of them is counted for all.
    """
    # The first batch of a curriculum is an easy one and may be shorter than those it leads to.
    whole = replace(config, train=replace(config.train, curriculum=0))
    objective, batch = Objective(build(config.model), config.train), draw(whole, 0)
    # Rows of different length sleep on different windows, and the head is for predicted tokens alone: where
    # rows differ, none can stand for the others.
    differ = not bool((batch.loss_mask == batch.loss_mask[:1]).all())
    if differ or batch.lengths is not None or batch.context_lengths is not None:
        parts = batch.parts(config.train.accumulate)
        return sum(count_flops(objective, part, config.sleep) for part in parts)
    samples = batch.parts(config.train.batch_size)
    return len(samples) * count_flops(objective, samples[0], config.sleep)


def training_flops(config: RunConfig, of: Callable[[RunConfig], int] = flops_per_step) -> int:
    """Count the FLOPs of a whole training run, all its steps like the first one with so many passes.

    Where passes are drawn, each number counts equally often. `of` counts those of a step.
    """
    train, sleep = config.train, config.sleep
    early = min(train.early_steps, train.steps)

    def of_a_step(most: int) -> int:
        drawn = range(1, most + 1) if train.random_passes else (most,)
        counted = [of(replace(config, sleep=sleep.with_passes(n))) for n in drawn]
        return sum(counted) // len(counted)

    # As `sleep_at` gives them out: early steps take no more passes than the run has.
    few = of_a_step(min(train.early_passes, sleep.passes)) if early else 0
    return early * few + (train.steps - early) * of_a_step(sleep.passes)
