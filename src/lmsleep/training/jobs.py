"""Many runs side by side, one process each, finished ones skipped."""

import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lmsleep.progress import progress
from lmsleep.training.config import RunConfig
from lmsleep.training.loop import Interrupted, Trainer
from lmsleep.training.runs import BRANCH, RunFolder
from lmsleep.training.workers import begun_deaf, leave_with_parent


@dataclass(frozen=True)
class Job:
    """One run, and optionally a shorter one that shares its start.

    A shorter run with the same settings makes the same steps until its learning rates begin to fall
    (`optim.schedule`), so it is continued from there instead of being trained twice.
    """

    path: Path
    config: RunConfig
    shorter: "Job | None" = None

    @property
    def branch_step(self) -> int:
        """Return the step at which the shorter run leaves; raises ValueError if it is not a shorter twin."""
        assert self.shorter is not None
        short, long = self.shorter.config, self.config
        if replace(short, train=replace(short.train, steps=long.train.steps)) != long:
            raise ValueError(f"{self.shorter.path} must differ from {self.path} in its steps alone")
        # Up to here the shorter run's rates have not begun to fall, and no longer run falls sooner.
        return math.floor((1 - short.train.decay) * short.train.steps)


def default_workers() -> int:
    """Count one worker for each GPU; where there is none, for each CPU core."""
    return torch.cuda.device_count() or os.cpu_count() or 1


def check_workers(workers: int | None) -> None:
    """Raise ValueError unless there is a worker (None: `default_workers`)."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")


def run_all(jobs: Sequence[Job], workers: int | None = None) -> None:
    """Train every run that has no report yet, `workers` at a time (default: `default_workers`).

    GPUs are dealt out to the workers in turn, and CPU cores evenly (where a run does not say its threads). A
    run that was stopped goes on from its last checkpoint.

    Raises:
        ValueError: if a folder holds a run of another configuration, or for no worker.
        RuntimeError: if a run failed; the others are finished first.
        Interrupted: after SIGINT or SIGTERM; the runs under way are saved first.
    """
    check_workers(workers)
    places = [job.path for one in jobs for job in (one, one.shorter) if job is not None]
    if len(set(places)) < len(places):
        raise ValueError("jobs: two runs have one folder; name each once")
    todo = [job for job in jobs if not _finished(job)]
    if not todo:
        return
    # A forked process can use no CUDA that its parent has touched, and inherits locks of PyTorch's threads.
    context = multiprocessing.get_context("spawn")
    lock, failed = context.RLock(), []  # one lock, so that progress bars do not overwrite each other
    tqdm.set_lock(lock)
    workers = min(workers or default_workers(), len(todo))
    # A pool does not number its workers, so that each draws its number, which picks its GPU.
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    started: dict[str, Any] = {"initializer": _start, "initargs": (lock, numbers, workers)}
    with (
        ProcessPoolExecutor(workers, context, **started) as pool,
        progress(total=len(jobs), initial=len(jobs) - len(todo), desc="runs", unit="run", position=0) as bar,
        _raising_interrupted(),
    ):
        try:
            with begun_deaf():
                futures = [pool.submit(_run, job) for job in todo]
            for done in as_completed(futures):
                path, error = done.result()
                bar.update()
                bar.set_postfix_str(path.name)
                if error:
                    failed.append(f"{path}: {error}")
        # Whatever ends the waiting must stop the workers too: leaving the pool would wait for their runs.
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()  # its run saves itself
            raise
    if failed:
        raise RuntimeError("; ".join(failed))


@contextmanager
def _raising_interrupted() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`, which ends the waiting for workers at once."""

    def stop(signum: int, _: object) -> None:
        raise Interrupted(signum, "stopped; the same command goes on where it was")

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _finished(job: Job) -> bool:
    """Say whether a job and its shorter one have reports; raises ValueError for another configuration."""
    if not (job.path / "config.json").exists():
        return False
    folder = RunFolder.open(job.path)
    if not folder.is_of(job.config):
        raise ValueError(
            f"{job.path} holds a run of another configuration; remove it or choose another folder"
        )
    return folder.report() is not None and (job.shorter is None or _finished(job.shorter))


def _start(lock: object, numbers: SimpleQueue[int], workers: int) -> None:
    """Prepare a worker process: its bars, its threads, its GPU, and who may stop it."""
    leave_with_parent(signal.SIGINT)  # between runs the parent decides
    tqdm.set_lock(lock)
    number, gpus = numbers.get(), torch.cuda.device_count()
    torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
    if gpus:
        torch.cuda.set_device(number % gpus)


def _run(job: Job) -> tuple[Path, str | None]:
    """Train a job in a worker; errors are returned, for exceptions do not all survive the way back."""
    # The line of its bar: children are numbered from 1, and line 0 is the bar of all runs.
    position = multiprocessing.current_process()._identity[0]
    try:
        trainer = _trainer(job)
        with trainer.folder.locked():
            if job.shorter is not None and not _finished(job.shorter):
                trainer = _train_shorter(job, job.shorter, trainer, position)
            trainer.fit(position=position)
    except Interrupted as stop:
        os._exit(128 + stop.signum)  # an exception would only end the run, and the worker take the next
    except (RuntimeError, ValueError, OSError) as error:
        return job.path, str(error)
    return job.path, None


def _train_shorter(job: Job, shorter: Job, trainer: Trainer, position: int) -> Trainer:
    """Train to where the shorter run leaves, and that run to its end; return the trainer to go on with."""
    # An earlier call without the shorter run, or one whose result was removed, has trained past it.
    if trainer.step > job.branch_step:
        trainer = Trainer(trainer.folder, job.config)  # the shared start is gone: begin again
    trainer.fit(until=job.branch_step, position=position)
    # Under another name than "step", so that it is not among the checkpoints that are thinned out.
    start = trainer.save(BRANCH)
    short = RunFolder(shorter.path)
    with short.locked():
        # Half of it may be there from a call that was stopped; it costs the fall alone to do again.
        short.clear()
        short.make(shorter.config)
        # Its history is the longer run's; `fit` drops what lies after the branch.
        for record in trainer.folder.metrics():
            short.log(record)
        Trainer.resume(short, start).fit(position=position)
    # Only the shorter run begins here; the longer one goes on with the trainer at hand.
    shutil.rmtree(start)
    return trainer


def _trainer(job: Job) -> Trainer:
    """Begin a job's run, or go on with it."""
    if not (job.path / "config.json").exists():
        return Trainer.begin(job.path, job.config)
    return Trainer.take_up(RunFolder.open(job.path))
