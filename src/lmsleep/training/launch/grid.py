"""Many runs: finished ones are skipped, failed ones named, and the same call goes on after a stop."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from lmsleep.progress import progress
from lmsleep.training.jobs import Job
from lmsleep.training.launch.launcher import Launcher, check_workers
from lmsleep.training.launch.local import Local
from lmsleep.training.loop import Interrupted


def run_all(jobs: Sequence[Job], workers: int | None = None, launcher: Launcher | None = None) -> None:
    """Train every run that has no report yet; one that was stopped goes on from its last checkpoint.

    Args:
        jobs: the runs, each in a folder of its own.
        workers: how many at a time; default what the launcher has room for.
        launcher: where they are trained (`find_launcher`); default the processes of this machine.

    Raises:
        ValueError: if a folder holds a run of another configuration, or for no worker.
        RuntimeError: if a run failed; the others are finished first.
        Interrupted: after SIGINT or SIGTERM; the runs under way are saved first.
    """
    check_workers(workers)
    places = [job.path for one in jobs for job in (one, one.shorter) if job is not None]
    if len(set(places)) < len(places):
        raise ValueError("jobs: two runs have one folder; name each once")
    todo = {job.path.absolute(): job for job in jobs if not job.finished()}
    if not todo:
        return
    failed = []
    # Before signals are ours: what launchers begin with may set handlers of its own.
    endings = (launcher or Local()).run([job.absolute() for job in todo.values()], workers)
    with (
        closing(endings),  # which stops the runs, whatever ended the waiting
        progress(total=len(jobs), initial=len(jobs) - len(todo), desc="runs", unit="run", position=0) as bar,
        _raising_interrupted(),
    ):
        for path, error in endings:
            bar.update()
            bar.set_postfix_str(path.name)
            if error is not None:
                failed.append(f"{todo[path].path}: {error}")
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
