"""What a launcher is, and how the command line names one."""

import json
from collections.abc import Generator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

from lmsleep.training.jobs import Job

Name = Literal["local", "ray", "slurm"]


class Ended(NamedTuple):
    """A run that came to an end, and what went wrong with it."""

    path: Path
    error: str | None


class Launcher(Protocol):
    """Trains jobs in processes of its own, somewhere.

    It is made from a mapping of options, each with its own; ValueError for one that it does not have, or if
    what it needs is not installed.
    """

    def run(self, jobs: Sequence[Job], workers: int | None) -> Generator[Ended]:
        """Train jobs, and yield each when it ends, failed ones too.

        Who closes the generator, or raises within it, stops the runs under way, which save themselves.

        Args:
            jobs: of which none is finished; their folders are absolute.
            workers: how many at a time; None: as many as there is room for.

        Raises:
            OSError, RuntimeError, ValueError: if nothing can be launched.
        """
        ...


def find_launcher(name: Name, options: Sequence[str] = ()) -> Launcher:
    """Return a launcher.

    Args:
        name: local, ray or slurm.
        options: words KEY=VALUE; values are JSON, or texts where they are none.

    Raises:
        ValueError: for an unknown name or option, or if what the launcher needs is not installed.
    """
    if name not in get_args(Name):
        raise ValueError(f"launcher={name!r}: choose one of {', '.join(get_args(Name))}")
    try:
        module = import_module(f"lmsleep.training.launch.{name}")
    # Each of what need not be installed is an extra of the launcher's name.
    except ModuleNotFoundError as error:
        raise ValueError(f"launcher={name} needs {error.name}: pip install 'lmsleep[{name}]'") from None
    made: Launcher = getattr(module, name.title())(_parsed(options))
    return made


def _parsed(options: Sequence[str]) -> Mapping[str, Any]:
    """Read words KEY=VALUE."""
    found: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key and equals and value):
            raise ValueError(f"launcher_options: {option!r} is not KEY=VALUE")
        if key in found:
            raise ValueError(f"launcher_options: {key} is named twice")
        try:
            found[key] = json.loads(value)
        except (ValueError, RecursionError):
            found[key] = value
    return found


def check_workers(workers: int | None) -> None:
    """Raise ValueError unless there is a worker (None: as many as the launcher likes)."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
