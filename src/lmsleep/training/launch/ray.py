"""Runs as tasks of Ray: on the cluster that RAY_ADDRESS names, or that runs here, or one made for them."""

import os
import signal
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from lmsleep.training.jobs import Job
from lmsleep.training.launch.launcher import Ended
from lmsleep.training.launch.remote import Work
from lmsleep.training.loop import Interrupted
from lmsleep.training.sources import Sources

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

GRACE = 60.0  # seconds for runs to save themselves when all are stopped


class Ray:
    """A task for each run, with a GPU where the cluster has any; what a task has is changed by options.

    Options are those of Ray's tasks: `num_cpus`, `num_gpus`, `resources`, `max_retries` and so on. A task
    whose worker dies is done again, and its run goes on from its last checkpoint.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        # A process for each run: what one leaves on a GPU or in PyTorch's settings ends with it.
        self._task = ray.remote(max_calls=1)(_run)
        try:
            self._task.options(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"launcher_options: {error}") from error
        self._options = options

    def run(self, jobs: Sequence[Job], workers: int | None) -> Generator[Ended]:
        """Train jobs as tasks; see `Launcher`."""
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        gpus = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {}
        return self._endings(jobs, workers or len(jobs), {**gpus, **self._options})

    def _endings(self, jobs: Sequence[Job], workers: int, options: Mapping[str, Any]) -> Generator[Ended]:
        """Submit `workers` tasks at a time, and yield what becomes of them."""
        waiting, running, sources = deque(jobs), dict[Any, Job](), Sources.here()
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.popleft()
                    task = self._task.options(**{"name": job.path.name, **options})
                    running[task.remote(Work(job, sources))] = job
                (done, *_), _ = ray.wait([*running])
                job = running.pop(done)
                yield Ended(job.path, _error(done, job))
        except BaseException:
            for each in running:
                ray.cancel(each)  # as if by Ctrl-C: its run saves itself
            if running:
                ray.wait([*running], num_returns=len(running), timeout=GRACE)
            raise


def _error(done: Any, job: Job) -> str | None:
    """Return what went wrong with a task that ended."""
    try:
        said = ray.get(done)
    except ray.exceptions.RayError as error:
        # Of what the worker raised the last line says what it was; of a worker that died, the first.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        said = lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]
    return said and f"{said} (log: {_log(job)})"


def _log(job: Job) -> Path:
    """Return where the worker writes what it has to say, for every machine that sees the folder."""
    return job.path.parent / ".ray" / f"{job.path.name}.log"


def _run(work: Work) -> str | None:
    """Train a job in a worker of Ray; return what went wrong."""
    log = _log(work.job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file, redirect_stderr(file):
        try:
            return work.done()
        except Interrupted as stop:
            # Cancelled: Ray does not do it again, and nobody waits for the answer.
            if stop.signum == signal.SIGINT:
                return str(stop)
    # The machine is taken away: a worker that dies has its task done again, elsewhere.
    os._exit(128 + signal.SIGTERM)
