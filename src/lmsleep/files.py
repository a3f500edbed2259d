"""Files that are either old or new, never half written."""

import os
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`: to a sibling first, synced to disk, then renamed over it.

    Raises:
        OSError: if the folder cannot be written or the disk is full; the old file is untouched.
    """
    name = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with name.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        name.replace(path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
