"""Runs as jobs of Slurm, by submitit: an array of them, each requeued until its run is finished."""

import json
import os
import signal
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission, as_completed
from tqdm import tqdm

from lmsleep.files import locked, write_atomic
from lmsleep.training.jobs import Job
from lmsleep.training.launch.launcher import Ended
from lmsleep.training.launch.remote import Work
from lmsleep.training.loop import Interrupted
from lmsleep.training.sources import Sources

MINUTES = 60  # of a job, where nothing is said; its run goes on in the next
REQUEUES = 1000  # of a job whose time was up: more than a run takes, and one that never gets on ends some day
POLL = 5  # seconds between looks at what has ended
SIGNAL = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")  # of submitit: the time is nearly up
# Options by names of submitit; all others are Slurm's own, to which it wants a prefix.
COMMON = {"name", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "stderr_to_stdout"}
FIXED = {
    "nodes": "a run is one process",
    "tasks_per_node": "a run is one process",
    "ntasks_per_node": "a run is one process",
    "array_parallelism": "name --workers",
}


class Slurm:
    """A job of Slurm for each run, in one array; this process waits for them, and may go and come back.

    Options are the parameters of submitit's executor (`timeout_min`, `gpus_per_node`, `cpus_per_task`,
    `mem_gb`) and of sbatch (`partition`, `account`, `qos`, `constraint`, ...). `cluster=local` or
    `cluster=debug` takes processes of this machine, or this very process, in Slurm's place.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._cluster = options.get("cluster", "slurm")
        self._options: dict[str, Any] = {}
        for key, value in options.items():
            plain = key.removeprefix("slurm_").replace("-", "_")
            if plain in FIXED:
                raise ValueError(f"launcher_options: {key} is not yours to say: {FIXED[plain]}")
            name = "timeout_min" if plain == "time" else plain if plain in COMMON else f"slurm_{plain}"
            if name in self._options:
                raise ValueError(f"launcher_options: {key} is said twice, under two names")
            if key != "cluster":
                self._options[name] = value
        minutes = self._options.setdefault("timeout_min", MINUTES)
        # submitit counts with it.
        if type(minutes) is not int or minutes < 1:
            raise ValueError(f"launcher_options: timeout_min={minutes} must be minutes, a whole number")
        self._options.setdefault("name", "lmsleep")
        self._options.setdefault("stderr_to_stdout", True)  # one log a run
        if self._cluster == "slurm" and submitit.SlurmExecutor.affinity() < 0:
            raise ValueError("launcher=slurm finds no srun on this machine: call it where sbatch works")
        self._executor(Path(), 1)  # for what it thinks of the options

    def _executor(self, folder: Path, workers: int) -> submitit.AutoExecutor:
        """Return what submits jobs; raises ValueError for options that it does not have."""
        try:
            executor = submitit.AutoExecutor(folder, self._cluster, slurm_max_num_timeout=REQUEUES)
            executor.update_parameters(**self._options, slurm_array_parallelism=workers)
        # It raises names, and asserts types.
        except (AssertionError, NameError, TypeError, ValueError) as error:
            raise ValueError(f"launcher_options: {str(error).splitlines()[0]}") from error
        return executor

    def run(self, jobs: Sequence[Job], workers: int | None) -> Generator[Ended]:
        """Train jobs as jobs of Slurm; see `Launcher`. What an earlier call has submitted is waited for."""
        folder = jobs[0].path.parent / ".slurm"
        folder.mkdir(parents=True, exist_ok=True)
        sources, submitted = Sources.here(), dict[submitit.Job[Any], _Record]()
        with locked(folder):
            records = [_Record(job) for job in jobs]
            there = {record: found for record in records if (found := record.running(sources))}
            new = [record for record in records if record not in there]
            if new:
                tasks = [_Task(record.job, sources) for record in new]
                made = self._executor(folder, workers or len(new)).submit_array(tasks)
                submitted = dict(zip(made, new, strict=True))
                for each, record in submitted.items():
                    record.write(self._cluster, each.job_id, sources)
        for record, found in there.items():
            tqdm.write(f"{record.job.path} is with Slurm already, as job {found.job_id}", file=sys.stderr)
        return _endings({found: record for record, found in there.items()} | submitted, submitted)


def _endings(
    jobs: Mapping["submitit.Job[Any]", "_Record"], ours: Mapping["submitit.Job[Any]", "_Record"]
) -> Generator[Ended]:
    """Yield what becomes of jobs; those that are ours are cancelled if nobody waits for them any more."""
    left = {**ours}
    try:
        for done in as_completed([*jobs], poll_frequency=POLL):
            record = jobs[done]
            left.pop(done, None)
            record.remove()
            # What was raised is returned: all else is the end of a process, of which Slurm knows more.
            said = f"job {done.job_id} ended as {done.state}" if done.exception() else done.result()
            yield Ended(record.job.path, said and f"{said} (log: {done.paths.stdout})")
    except BaseException:
        for each, record in left.items():
            each.cancel(check=False)  # its run saves itself
            record.remove()
        raise


@dataclass(frozen=True, eq=False)
class _Record:
    """Which job of Slurm has a run, in a file beside it: who submitted it may be gone, on another machine."""

    job: Job

    @property
    def _path(self) -> Path:
        return self.job.path.parent / ".slurm" / f"{self.job.path.name}.json"

    def write(self, cluster: str, job_id: str, sources: Sources) -> None:
        """Note who has the run; processes of this machine are not found again."""
        if cluster == "slurm":
            said = {"job": job_id, "folder": str(self._path.parent), "files": sources.files}
            write_atomic(self._path, (json.dumps(said) + "\n").encode())

    def remove(self) -> None:
        """Forget it."""
        self._path.unlink(missing_ok=True)

    def running(self, sources: Sources) -> "submitit.Job[Any] | None":
        """Return the job that has the run, queued or running; raises ValueError for one of other sources."""
        try:
            said = json.loads(self._path.read_bytes())
            found = submitit.SlurmJob(folder=said["folder"], job_id=said["job"])
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{self._path} is damaged; remove it") from None
        if found.done(force_check=True):
            return None
        if said["files"] != sources.files:
            raise ValueError(
                f"{self.job.path} is with Slurm as job {found.job_id}, by other sources of lmsleep than "
                f"these; wait for it, or: scancel {found.job_id}"
            )
        return found


class _Task:
    """What a job of Slurm does: it trains a run, and is requeued when its time is nearly up."""

    def __init__(self, job: Job, sources: Sources) -> None:
        self._work = Work(job, sources)

    def __call__(self) -> str | None:
        """Train the run; return what went wrong."""
        requeue, idle = signal.getsignal(SIGNAL), signal.getsignal(signal.SIGTERM)
        warned: list[FrameType | None] = []

        def warn(_: int, frame: FrameType | None) -> None:
            warned.append(frame)
            # While no step is under way there is nothing to save.
            if signal.getsignal(signal.SIGTERM) == idle:
                again()
            os.kill(os.getpid(), signal.SIGTERM)  # heard by the run, which saves itself after the step

        def again() -> None:
            assert callable(requeue), "submitit hears the signal"
            requeue(SIGNAL, warned[0])  # asks Slurm for another turn, and exits

        signal.signal(SIGNAL, warn)
        try:
            return self._work.done()
        except Interrupted as stop:
            sys.stderr.write(f"{stop}\n")
            if warned:
                again()
            # No result: Slurm may have a preempted job requeued by itself, and it is then not at its end.
            sys.exit(128 + stop.signum)
        finally:
            signal.signal(SIGNAL, requeue)

    def checkpoint(self) -> "DelayedSubmission":
        """Return what the next turn does: the same, for the run's folder says where it is."""
        return DelayedSubmission(self)
