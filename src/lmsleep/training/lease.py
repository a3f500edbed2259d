"""Who trains a run, told in a file: for machines whose file locks do not reach each other.

A lock of the kernel (`files.locked`) ends with its process and needs no clock, but on many cluster file
systems it holds on one machine alone. The lease holds everywhere: a file that one process alone can make, and
that it touches again and again while it lives.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lmsleep.files import write_atomic

BEAT = 20.0  # seconds between touches
LOST = 180.0  # seconds without one: the machine is gone; attributes are cached for up to 60 by NFS
SETTLE = 1.0  # seconds in which another one may take the same lease over


@contextmanager
def leased(path: Path, *, alone: bool) -> Iterator[None]:
    """Hold the lease `path`, a file that is there only meanwhile.

    Args:
        path: the file.
        alone: no other process of this machine can hold it, for this one has the lock.

    Raises:
        ValueError: if another process holds it, saying where.
        OSError: if its folder cannot be written.
    """
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "token": secrets.token_hex(8),
    }
    _take(path, mine, alone)
    ended = threading.Event()
    # A daemon: a process that is done leaves, and what it held is then found untouched.
    beat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        # And no other's, should this process have been stopped for so long that it was taken for dead.
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _take(path: Path, mine: dict[str, object], alone: bool) -> None:
    """Make the lease, or take over that of a process that is gone."""
    said = json.dumps(mine).encode()
    while True:
        try:
            path.touch(exist_ok=False)  # by one process only
        except FileExistsError:
            pass
        else:
            _sign(path, said)
            return
        holder = _signed(path)
        # Of a process of this machine that was killed, or of one that was before it could sign.
        dead = not holder or (alone and holder.get("machine") == mine["machine"])
        if not dead:
            age = _age(path)
            if age is None:  # it was let go meanwhile
                continue
            if age < LOST:
                raise ValueError(f"process {holder.get('pid')} on {holder.get('host')}")
        _sign(path, said)
        # Others may have seen the same.
        time.sleep(0 if dead and holder else SETTLE)
        # The last one to sign has it.
        if _read(path) == mine:
            return


def _sign(path: Path, said: bytes) -> None:
    """Write who holds a lease; one that cannot be signed is let go."""
    try:
        write_atomic(path, said)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _signed(path: Path) -> dict[str, object]:
    """Return who holds a lease, after giving time to sign it; nothing if nobody does."""
    until = time.monotonic() + SETTLE
    while not (holder := _read(path)) and path.exists() and time.monotonic() < until:
        time.sleep(SETTLE / 20)
    return holder


def _age(path: Path) -> float | None:
    """Return the seconds since a file was touched, by the clock of its file system; None if it is gone."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    probe.touch()
    try:
        # Opened, for that asks the server anew.
        with path.open("rb") as file:
            return probe.stat().st_mtime - os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _beat(path: Path, ended: threading.Event) -> None:
    """Touch a file until it is time to end."""
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _read(path: Path) -> dict[str, object]:
    """Return who holds a lease; nothing where that is not written yet, or nobody."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _machine() -> str:
    """Return what tells this machine, as long as it is up, from others, which may have its name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
