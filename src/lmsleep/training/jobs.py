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

from lmsleep.training.config import RunConfig
from lmsleep.training.loop import Interrupted, Trainer
from lmsleep.training.progress import progress
from lmsleep.training.runs import RunFolder
from lmsleep.training.workers import leave_with_parent


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
        """The step at which the shorter run leaves; raises ValueError if it is not a shorter twin."""
        assert self.shorter is not None
        short, long = self.shorter.config, self.config
        if replace(short, train=replace(short.train, steps=long.train.steps)) != long:
            raise ValueError(f"{self.shorter.path} must differ from {self.path} in its steps alone")
        return math.floor((1 - short.train.decay) * short.train.steps)


def default_workers() -> int:
    """One for each GPU; where there is none, for each CPU core."""
    return torch.cuda.device_count() or os.cpu_count() or 1


def run_all(jobs: Sequence[Job], workers: int | None = None) -> None:
    """Train every run that has no report yet, `workers` at a time (default: `default_workers`).

    GPUs are dealt out to the workers in turn, and CPU cores evenly (where a run does not say its threads). A
    run that was stopped goes on from its last checkpoint.

    Raises:
        ValueError: if a folder holds a run of another configuration.
        RuntimeError: if a run failed; the others are finished first.
        Interrupted: after SIGINT or SIGTERM; the runs under way are saved first.
    """
    todo = [job for job in jobs if not _finished(job)]
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    lock, failed = context.RLock(), []  # one lock, so that progress bars do not overwrite each other
    tqdm.set_lock(lock)
    workers = min(workers or default_workers(), len(todo))
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
            for done in as_completed([pool.submit(_run, job) for job in todo]):
                path, error = done.result()
                bar.update()
                bar.set_postfix_str(path.name)
                if error:
                    failed.append(f"{path}: {error}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()  # its run saves itself
            raise
    if failed:
        raise RuntimeError("; ".join(failed))


@contextmanager
def _raising_interrupted() -> Iterator[None]:
    def stop(signum: int, _: object) -> None:
        raise Interrupted(signum, "stopped; the same command goes on where it was")

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _finished(job: Job) -> bool:
    if not (job.path / "config.json").exists():
        return False
    folder = RunFolder.open(job.path)
    if folder.config().to_dict() != job.config.to_dict():
        raise ValueError(
            f"{job.path} holds a run of another configuration; remove it or choose another folder"
        )
    return folder.report() is not None and (job.shorter is None or _finished(job.shorter))


def _start(lock: object, numbers: SimpleQueue[int], workers: int) -> None:
    leave_with_parent()
    tqdm.set_lock(lock)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between runs the parent decides
    number, gpus = numbers.get(), torch.cuda.device_count()
    torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
    if gpus:
        torch.cuda.set_device(number % gpus)


def _run(job: Job) -> tuple[Path, str | None]:
    """Train a job in a worker; errors are returned, for exceptions do not all survive the way back."""
    position = multiprocessing.current_process()._identity[0]
    try:
        trainer = _trainer(job)
        if job.shorter is not None and not _finished(job.shorter):
            if trainer.step > job.branch_step:
                trainer = Trainer(trainer.folder, job.config)  # the shared start is gone: begin again
                trainer.folder.rewind(0)
            trainer.fit(until=job.branch_step, position=position)
            start = trainer.save("branch")
            shutil.rmtree(job.shorter.path, ignore_errors=True)
            short = RunFolder.create(job.shorter.path, job.shorter.config)
            for record in trainer.folder.metrics():
                short.log(record)
            Trainer.resume(short, start).fit(position=position)
            shutil.rmtree(start)
        trainer.fit(position=position)
    except Interrupted as stop:
        os._exit(128 + stop.signum)  # an exception would only end the run, and the worker take the next
    except (RuntimeError, ValueError, OSError) as error:
        return job.path, str(error)
    return job.path, None


def _trainer(job: Job) -> Trainer:
    if not (job.path / "config.json").exists():
        return Trainer(RunFolder.create(job.path, job.config), job.config)
    return Trainer.take_up(RunFolder.open(job.path))
