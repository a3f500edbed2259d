"""A job on another machine: the same sources, the same folder."""

import hashlib
import socket
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from lmsleep.training.jobs import Job
from lmsleep.training.loop import Interrupted
from lmsleep.training.runs import commit
from lmsleep.version import __version__

PATIENCE = 300.0  # seconds for whoever trained the run before to save it, or to be found dead


@dataclass(frozen=True)
class Sources:
    """Which lmsleep it is: equal where its files are, whatever they are called."""

    files: str
    """A hash of them."""
    name: str = field(compare=False)
    """Version and commit, for people."""

    @classmethod
    def here(cls) -> "Sources":
        """Return those of this process."""
        package, found = Path(__file__).parents[2], hashlib.sha256()
        for file in sorted(package.rglob("*.py")):
            found.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes() + b"\0")
        return cls(found.hexdigest(), f"{__version__}, commit {commit() or 'unknown'}")

    def __str__(self) -> str:
        return f"{self.name}, files {self.files[:12]}"


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
