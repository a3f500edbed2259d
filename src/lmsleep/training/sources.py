"""Which lmsleep it is: processes that work on one run must have the same."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lmsleep.training.runs import commit
from lmsleep.version import __version__


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
        package, found = Path(__file__).parents[1], hashlib.sha256()
        for file in sorted(package.rglob("*.py")):
            found.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes() + b"\0")
        return cls(found.hexdigest(), f"{__version__}, commit {commit() or 'unknown'}")

    def __str__(self) -> str:
        return f"{self.name}, files {self.files[:12]}"


def software() -> dict[str, str]:
    """Return what processes that work together must have the same of, by names for people."""
    return {"sources of lmsleep": Sources.here().files[:12], "torch": torch.__version__}
