"""One part of the day on a GPU: what it is, and what a try leaves."""

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.processor import Processor
from benchmarks.table import Table
from lmsleep.files import write_atomic
from lmsleep.training.runs import provenance

Result = dict[str, Any]
PACKAGES = ("torch", "triton", "flash-linear-attention", "transformers", "numpy")


class Disagrees(AssertionError):
    """What was measured is not what it must be; the table that shows it was kept."""


@dataclass(frozen=True)
class Try:
    """What a part works with.

    Attributes:
        processor: what is measured.
        tiny: sizes that show that it runs, and no more.
        folder: where it may keep what it goes on with.
        before: the rows that an earlier try left, under the note of their table.
        keep: writes the table so far, in case no more comes of it.
    """

    processor: Processor
    tiny: bool
    folder: Path
    before: Result
    keep: Callable[[Table], None]


@dataclass(frozen=True)
class Part:
    """A table, and how it is made.

    Attributes:
        name: of its file.
        title: what is measured.
        seconds: its limit if the whole has `WHOLE` seconds; otherwise in proportion.
        measure: `MODULE:FUNCTION`, which makes the table of a `Try`; named, for each needs packages that
            the others do not.
    """

    name: str
    title: str
    seconds: int
    measure: str


@dataclass(frozen=True)
class Outcome:
    """The file of a part.

    Attributes:
        path: the file.
        made: the command and commit, for `made_by`.
        rehearsal: marks what says nothing about a GPU.
    """

    path: Path
    made: Result
    rehearsal: bool

    def read(self) -> Result:
        """Return what is there; nothing of a file that is damaged or of the other kind."""
        try:
            found = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and found.get("rehearsal", False) == self.rehearsal else {}

    def finished(self) -> bool:
        """Say whether the part has been done."""
        found = self.read()
        return "rows" in found and "error" not in found and "unfinished" not in found

    def write(self, table: Table | None = None, **why: str) -> None:
        """Write a table, or the one that is there, and why it is not all: `error` or `unfinished`."""
        left = {name: value for name, value in self.read().items() if name in ("rows", "note", "made_by")}
        new = left if table is None else {**asdict(table), "made_by": made_by(self.made)}
        marked = {"rehearsal": True} if self.rehearsal else {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, (json.dumps({**marked, **new, **why}, indent=1) + "\n").encode())


def made_by(made: Result) -> Result:
    """Say what makes a result: command, commit, hardware, versions, seed."""
    found = provenance()
    found["commit"] = found["commit"] or made["commit"]
    found["command"] = made["command"]
    found["packages"] = {name: version for name in PACKAGES if (version := _version(name))}
    if torch.cuda.is_available():
        found["memory"] = torch.cuda.get_device_properties(0).total_memory
        found["cuda"] = torch.version.cuda
    return {**found, "seed": 0}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
