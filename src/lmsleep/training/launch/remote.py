"""A job on another machine: the same sources, the same folder."""

import socket
import traceback
from dataclasses import dataclass

from lmsleep.training.jobs import Job
from lmsleep.training.loop import Interrupted
from lmsleep.training.sources import Sources

PATIENCE = 300.0  # seconds for whoever trained the run before to save it, or to be found dead


@dataclass(frozen=True)
class Work:
    """A job as a process on another machine gets it."""

    job: Job
    sources: Sources
    """Of who launched it."""

    def done(self) -> str | None:
        """Train the job; return what went wrong, with a traceback on standard error.

        Raises:
            Interrupted: after a signal; the run was saved.
        """
        here = Sources.here()
        if here != self.sources:
            return (
                f"{socket.gethostname()} has other sources of lmsleep ({here}) than this command had when it "
                f"began ({self.sources}); give both the same, and the same command goes on"
            )
        try:
            self.job.train(patience=PATIENCE)
        except Interrupted:
            raise
        # Of any type: what is raised here would come back as many lines, if it came back at all.
        except Exception as error:
            traceback.print_exc()
            return str(error) or type(error).__name__
        return None
