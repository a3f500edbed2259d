"""Write files that are either old or new, never half written, and lock them."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`: to a sibling first, synced to disk, then renamed over it.

    Raises:
        OSError: if the folder cannot be written or the disk is full; the old file is untouched.
    """
    # A sibling lies on the same file system, so that renaming is atomic; process and random number keep two
    # writers apart, and the dot keeps it out of globs.
    name = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        with name.open("wb") as file:
            file.write(data)
            file.flush()  # out of Python's buffer, which fsync does not know
            # Without it a crash of the machine may leave the new name with no data behind it.
            os.fsync(file.fileno())
        name.replace(path)
    # Ctrl-C too must leave no litter.
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def check_folder(path: Path, option: str) -> None:
    """Raise NotADirectoryError if no folder can be at `path`, which need not be there yet."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{option}={path}: {there} is a file; name a folder")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing `path`; the lock ends with this process, even a killed one.

    It is on a sibling, `.NAME.lock`, which stays: removing it would let two processes lock two files.

    Raises:
        OSError: if the folder is missing or cannot be written.
        ValueError: if another process holds the lock.
    """
    import fcntl  # not on Windows, where everything else works

    # Asked first, or the error would name the lock, of which the caller knows nothing.
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")
    # Never through a link, which others may have put there in a shared folder, and emptying nothing.
    lock = os.open(path.parent / f".{path.name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with os.fdopen(lock, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another process; wait for it to end") from None
        yield


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError that names no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
