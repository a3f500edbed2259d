"""What a run's data were: a hash of every file that its task draws from."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from lmsleep.tasks import Task


def hashes(task: Task) -> dict[str, str]:
    """Return the SHA-256 of each file that the task draws from (`sources`, if it has any), by path.

    A file that is missing has none.

    Raises:
        OSError: if one cannot be read.
    """
    sources: tuple[Path, ...] = getattr(task, "sources", tuple)()
    return {str(file): _sha256(file) for source in sources for file in _files(source.resolve())}


def check(run: Path, recorded: Mapping[str, str], task: Task, remedy: str) -> None:
    """Refuse data that are not those that `recorded` has the hashes of.

    Raises:
        ValueError: naming the first file that differs, and what to do about it.
    """
    now = hashes(task)
    for path in sorted({*recorded, *now}):
        if recorded.get(path) != now.get(path):
            what = (
                f"has changed since {run} was begun, and with it what is trained on and what is held out"
                if path in now
                else f"is gone, from which {run} draws its samples"
            )
            raise ValueError(f"data: {path} {what}; put it back as it was, or {remedy}")


def _files(source: Path) -> Iterator[Path]:
    """Yield a file, or those in a folder of datasets that hold rows."""
    if source.is_file():
        yield source
    # Not what `datasets` keeps in a folder of computations.
    yield from sorted(f for f in source.rglob("*.arrow") if not f.name.startswith("cache-"))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
