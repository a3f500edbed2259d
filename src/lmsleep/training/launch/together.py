"""Runs one after the other, each by all processes that torchrun has started."""

from collections.abc import Generator, Sequence

from lmsleep.training.jobs import Job
from lmsleep.training.launch.launcher import Ended
from lmsleep.training.loop import Interrupted
from lmsleep.training.processes import Lost, Processes


class Together:
    """All processes train a run, then the next one.

    Args:
        processes: all of which launch the same jobs.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def run(self, jobs: Sequence[Job], workers: int | None) -> Generator[Ended]:
        """Train jobs, one at a time; see `Launcher`."""
        del workers
        for job in jobs:
            error = None
            try:
                job.train(processes=self.processes)
            except (Interrupted, Lost):  # of no run alone
                raise
            except (RuntimeError, ValueError, OSError) as failed:
                error = str(failed)
            yield Ended(job.path, error)
