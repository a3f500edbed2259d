"""Write files that are either old or new, never half written, and lock them."""

import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

LONG = 200  # bytes of a name; file systems allow 255, and ours add to it
LEFTOVER = re.compile(r"\.(\d+)\.[0-9a-f]+")  # after the name: of a temporary file, by whom


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, as `replacing` does.

    Raises:
        OSError: naming `path`, if the folder cannot be written or the disk is full; the old file is
            untouched.
    """
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a file to write, which takes the place of `path` once it is whole and synced to disk.

    A file that is replaced hands its mode on, and nobody may read the new one before who could not read the
    old one. A link is replaced, not followed. What killed writes of `path` left is removed.

    Args:
        path: the file.
        mode: permissions of a file that replaces none; the umask takes from them.

    Raises:
        OSError: naming `path`, if the folder cannot be written or the disk is full; the old file is
            untouched.
    """
    try:
        old = _regular(path)
        _sweep(path)
        # Private until it has the mode of what it replaces.
        name, file = _temporary(path, mode if old is None else 0o600)
        try:
            with file:
                yield file
                file.flush()  # out of Python's buffer, which fsync does not know
                if old is not None:
                    _permit(file.fileno(), old)
                # Without it a crash of the machine may leave the new name with no data behind it.
                os.fsync(file.fileno())
                if sys.platform == "win32":  # which renames no open file
                    file.close()
                name.replace(path)  # while the lock is held, or another writer might sweep it
        # Ctrl-C too must leave no litter.
        except BaseException:
            name.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        # A full disk names no file, other errors name ours, of which the caller knows nothing.
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which takes the place of `path` once it is whole.

    A kill leaves what was there, or for a moment nothing under the name; the next call removes what it left
    beside it. Folders above are made. Two processes that write the same folder must be kept apart (`locked`).

    Raises:
        OSError: if it cannot be written; what was there stays.
    """
    partial, old = _sibling(path, ".partial"), _sibling(path, ".old")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():  # no folder that holds something can be replaced
            path.rename(old)
        partial.rename(path)
    except BaseException:  # Ctrl-C too must leave no litter
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_folder(path: Path, option: str) -> None:
    """Raise NotADirectoryError if no folder can be at `path`, which need not be there yet."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{option}={path}: {there} is a file; name a folder")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing `path`; the lock ends with this process, even a killed one.

    It is on a sibling, `.NAME.lock`, which is removed in the end. Windows has no such locks: there it does
    nothing.

    Raises:
        OSError: if the folder is missing or cannot be written, or the name is longer than names may be.
        ValueError: if another process holds the lock.
    """
    if not path.is_dir():  # a folder can be locked as well
        check_place(path)
    if sys.platform == "win32":  # which has no such locks
        yield
        return
    name = _sibling(path, ".lock")
    while True:
        try:
            # Never through a link, which others may have put there in a shared folder, and emptying nothing.
            lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, locking it by {name.name}", str(path)) from None
        with os.fdopen(lock, "r+"):
            if not _claimed(lock):
                raise ValueError(f"{path} is being written by another process; wait for it to end")
            # Who held it has removed it since it was opened here: a lock on that one would keep nobody out.
            if not _is_at(lock, name):
                continue
            try:
                yield
            finally:
                if _is_at(lock, name):  # and no other one, should somebody have removed it by hand
                    name.unlink(missing_ok=True)
            return


def check_place(path: Path) -> None:
    """Refuse a place where no file can be written, before the work that it is to hold.

    Raises:
        OSError: if its folder is missing, it is a folder itself, or its name is longer than names may be.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    _regular(path)  # which asks for the name


def _regular(path: Path) -> os.stat_result | None:
    """Return what is known of a file; None if there is none, or something else (a link, a device)."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _sibling(path: Path, end: str) -> Path:
    """Return `.NAME` with `end` beside `path`: on its file system, and by the dot not in globs."""
    name, raw = path.name, os.fsencode(path.name)
    if len(raw) > LONG:
        name = hashlib.sha256(raw).hexdigest()[:32]
    return path.parent / f".{name}{end}"


def _temporary(path: Path, mode: int) -> tuple[Path, BinaryIO]:
    """Make a sibling `.NAME.PID.HEX` of `path`, to be renamed; its lock is held as long as it is open."""
    while True:
        # Process and random number keep two writers apart.
        name = _sibling(path, f".{os.getpid()}.{secrets.token_hex(4)}")
        # Exclusive: nothing that is there is opened, and no link is followed.
        file = open(name, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
        with suppress(OSError):  # file systems without locks: there nothing is swept
            if not _claimed(file.fileno()) or not _is_at(file.fileno(), name):
                file.close()  # swept before it was claimed
                continue
        return name, file


def _permit(file: int, old: os.stat_result) -> None:
    """Give an open file the permissions of an old one: the same mode, for the same group or for none."""
    if sys.platform == "win32":  # where they are those of the folder
        return
    now, mode = os.fstat(file), stat.S_IMODE(old.st_mode) & 0o777
    # Nobody but root may give files away; whose it was must still be able to read it.
    owner = old.st_uid if os.geteuid() == 0 else now.st_uid
    if (now.st_uid, now.st_gid) != (owner, old.st_gid):
        try:
            os.fchown(file, owner, old.st_gid)
        except PermissionError:  # its group would be ours, whose members may not be those of the old one
            mode &= ~0o070
    # Only where it changes something: some file systems know no modes and refuse.
    if stat.S_IMODE(now.st_mode) != mode:
        os.fchmod(file, mode)


def _sweep(path: Path) -> None:
    """Remove what killed writes of `path` left: temporary files that no writer holds."""
    begin = _sibling(path, "").name
    with os.scandir(path.parent) as entries:
        ours = [entry for entry in entries if entry.name.startswith(begin)]
    found = [(Path(e.path), match[1]) for e in ours if (match := LEFTOVER.fullmatch(e.name, len(begin)))]
    for name, pid in found:
        # Gone meanwhile, another user's, a link, or on a file system without locks: it stays.
        with suppress(OSError):
            if not _runs(int(pid)):
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                with os.fdopen(file):
                    if _claimed(file):
                        name.unlink()


def _runs(pid: int) -> bool:
    """Say whether a process other than this one runs under a number; of this one its locks tell."""
    if sys.platform == "win32":  # where asking would end it, and nothing is locked
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs, as another user
        return True
    # Numbers come again: in a container the killed writer may well have had ours.
    return pid != os.getpid()


def _claimed(file: int) -> bool:
    """Take the lock of an open file, which ends when it is closed; return False if another holds it."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: int, name: Path) -> bool:
    """Say whether an open file is the one under a name."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(name))
    except FileNotFoundError:
        return False
