"""Training batches by step: a function of the seed alone, whoever draws them."""

import math
import multiprocessing
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, get_args

import numpy as np
import torch

from lmsleep.tasks import Batch, Split, batch_rng
from lmsleep.training.config import RunConfig, TrainConfig
from lmsleep.training.optim import level
from lmsleep.training.workers import begun_deaf, leave_with_parent

AHEAD = 2  # batches a worker draws before they are wanted

_config: RunConfig | None = None  # of the run that this worker process draws for
_place = (0, 1)  # of the process that trains it: its rank, of how many


def draw(config: RunConfig, step: int, rank: int = 0, size: int = 1) -> Batch:
    """Draw the training batch of a step; of several processes, the rows that one of them reads.

    All together read the same rows, however many they are.
    """
    train = config.train
    step = drawn(step, train)
    several = range(train.draws)
    # Whole draws for each, if they go round: it need not make those of the others.
    mine = several[rank::size] if train.draws >= size else several
    made = []
    for number in mine:
        # Keyed by step and draw, not advanced from one to the next: any process can draw any, in any order.
        rng = batch_rng(train.seed, "train", step * train.draws + number)
        # As `np.array_split`: the first ones are one larger where it does not divide.
        rows = train.batch_size // train.draws + (number < train.batch_size % train.draws)
        made.append(config.task.batch(rng, rows, "train", level(step, train)))
    whole = Batch.joined(made)
    return whole if train.draws >= size else whole.share(rank, size)


def drawn(step: int, train: TrainConfig) -> int:
    """Return the step whose batch is read: its own, or one of the first `batches`, once in each epoch."""
    if train.batches is None or step < train.batches:
        return step
    epoch, place = divmod(step, train.batches)
    # A function of seed and step alone, like the batches.
    return int(np.random.default_rng((train.seed, epoch)).permutation(train.batches)[place])


def in_parts(batch: Batch, accumulate: int, batch_size: int) -> list[Batch]:
    """Cut what a process reads of a step into parts no larger than those of one that reads all of it.

    Args:
        batch: what it reads.
        accumulate: parts of the whole batch.
        batch_size: samples in the whole batch.
    """
    return batch.parts(math.ceil(batch.num_samples * accumulate / batch_size))


def check_samples(config: RunConfig) -> None:
    """Draw a sample of each split; raise what the task raises if it cannot."""
    # Some of what a task cannot draw shows only in drawing.
    for split in get_args(Split):
        config.task.batch(batch_rng(config.train.seed, split, 0), 1, split)


class Batches:
    """Batches of consecutive steps, drawn ahead by `config.train.data_workers` processes (0: here).

    Of several processes that train, one has the rows that it reads (`rank` of `size`).
    """

    def __init__(self, config: RunConfig, rank: int = 0, size: int = 1) -> None:
        self.config, self.place = config, (rank, size)
        self._pool: ProcessPoolExecutor | None = None
        self._drawn: dict[int, Future[Batch]] = {}

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step; steps should be asked for in order."""
        workers = self.config.train.data_workers
        if not workers:
            return draw(self.config, step, *self.place)
        # Started with the first batch: a Trainer that only evaluates, or cannot begin, starts no process.
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks
            plain = self.config.to_dict()  # each worker reads the data once, for itself
            self._pool = ProcessPoolExecutor(
                workers, context, initializer=_start, initargs=(plain, self.place)
            )
        # What is drawn ahead is bounded: finished batches wait in the memory of this process.
        with begun_deaf():
            for ahead in range(step, min(step + AHEAD * workers, self.config.train.steps)):
                if ahead not in self._drawn:
                    self._drawn[ahead] = self._pool.submit(_draw_mine, ahead)
        # Taken out, so that a batch is not held after its step.
        return self._drawn.pop(step).result()

    def close(self) -> None:
        """Stop the workers; the next batch starts them again."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._drawn = None, {}


def _start(plain: dict[str, Any], place: tuple[int, int]) -> None:
    """Prepare a worker process: its run, whose rows it draws, and who may stop it."""
    global _config, _place
    leave_with_parent(signal.SIGINT, signal.SIGTERM)  # the trainer decides when to stop
    # Workers share the cores with each other and with training; drawing has no large products.
    torch.set_num_threads(1)
    _config, _place = RunConfig.from_dict(plain), place


def _draw_mine(step: int) -> Batch:
    assert _config is not None, "_start comes first"
    return draw(_config, step, *_place)
