"""Runs in processes of this machine, which share its GPUs and cores."""

import multiprocessing
import os
import signal
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
from tqdm import tqdm

from lmsleep.training.jobs import Job
from lmsleep.training.launch.launcher import Ended
from lmsleep.training.loop import Interrupted
from lmsleep.training.workers import begun_deaf, leave_with_parent


def default_workers() -> int:
    """Count one worker for each GPU; where there is none, for each CPU core."""
    return torch.cuda.device_count() or os.cpu_count() or 1


class Local:
    """A process for each run, `default_workers` at a time where no number is said.

    GPUs are dealt out to the workers in turn, and CPU cores evenly (where a run does not say its threads).
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        if options:
            raise ValueError(f"launcher_options: the launcher local has none, got {', '.join(options)}")

    def run(self, jobs: Sequence[Job], workers: int | None) -> Generator[Ended]:
        """Train jobs in a pool of processes; see `Launcher`."""
        # A forked process can use no CUDA that its parent has touched, and inherits locks of PyTorch.
        context = multiprocessing.get_context("spawn")
        lock = context.RLock()  # one, so that progress bars do not overwrite each other
        tqdm.set_lock(lock)
        return self._endings(jobs, min(workers or default_workers(), len(jobs)), context, lock)

    def _endings(self, jobs: Sequence[Job], workers: int, context: Any, lock: object) -> Generator[Ended]:
        """Yield what becomes of the jobs."""
        # A pool does not number its workers, so that each draws its number, which picks its GPU.
        numbers = context.SimpleQueue()
        for number in range(workers):
            numbers.put(number)
        started: dict[str, Any] = {"initializer": _start, "initargs": (lock, numbers, workers)}
        with ProcessPoolExecutor(workers, context, **started) as pool:
            try:
                with begun_deaf():
                    futures = [pool.submit(_run, job) for job in jobs]
                for done in as_completed(futures):
                    yield done.result()
            # Whatever ends the waiting must stop the workers too: leaving the pool would wait for their runs.
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in multiprocessing.active_children():
                    worker.terminate()  # its run saves itself
                raise


def _start(lock: object, numbers: SimpleQueue[int], workers: int) -> None:
    """Prepare a worker process: its bars, its threads, its GPU, and who may stop it."""
    leave_with_parent(signal.SIGINT)  # between runs the parent decides
    tqdm.set_lock(lock)
    number, gpus = numbers.get(), torch.cuda.device_count()
    torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
    if gpus:
        torch.cuda.set_device(number % gpus)


def _run(job: Job) -> Ended:
    """Train a job in a worker; errors are returned, for exceptions do not all survive the way back."""
    # The line of its bar: children are numbered from 1, and line 0 is the bar of all runs.
    position = multiprocessing.current_process()._identity[0]
    try:
        job.train(position=position)
    except Interrupted as stop:
        os._exit(128 + stop.signum)  # an exception would only end the run, and the worker take the next
    except (RuntimeError, ValueError, OSError) as error:
        return Ended(job.path, str(error))
    return Ended(job.path, None)
