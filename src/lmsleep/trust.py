"""Which Python files may run because another file names them: a configuration, of a run or a model.

What a user's own program or command names runs at once. What a file names runs if it runs already in this
process, if a run was trained with it here as it is now, or if the user says so (`trust=True`, `--trust`).
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path

from lmsleep.files import write_atomic

# The file that is being read, and whether what it names may run; None while nothing but the user names code.
_named_by: ContextVar[tuple[Path, bool] | None] = ContextVar("named_by", default=None)


@contextmanager
def named_by(file: Path, *, trust: bool = False) -> Iterator[None]:
    """Say that code which is asked for meanwhile is named by `file`; `trust`: it may run.

    What is read while a trusted file is read is trusted too.
    """
    outer = _named_by.get()
    token = _named_by.set((file, trust or (outer is not None and outer[1])))
    try:
        yield
    finally:
        _named_by.reset(token)


def check(code: Path) -> None:
    """Refuse to run the Python file `code` if a file that nobody vouches for names it.

    Raises:
        PermissionError: naming both files.
    """
    named = _named_by.get()
    if named is None or named[1]:
        return
    known = _known(code)
    if known is not None and known == _digest(code):
        return
    why = "you have trained no run with" if known is None else "has changed since you trained a run with it"
    raise PermissionError(
        f"{named[0]} names code, {code}, which {why}: read it, and pass --trust (in Python: trust=True) "
        "if it may run here"
    )


def remember(codes: Iterable[Path]) -> None:
    """Note that this user has trained with Python files as they are now."""
    for code in codes:
        # Without a home, or one that can be written, `--trust` is asked for later: no reason not to train.
        with suppress(OSError, RuntimeError):
            _record(code).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(_record(code), f"{_digest(code)}  {code}\n".encode())


def _known(code: Path) -> str | None:
    """Return the digest of the file when a run was last trained with it."""
    try:
        return _record(code).read_text(errors="replace").split()[0]
    except (OSError, RuntimeError, IndexError):
        return None


def _record(code: Path) -> Path:
    """Return the file about a Python file; it is as `sha256sum` writes it."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "lmsleep/trusted" / sha256(os.fsencode(code)).hexdigest()


def _digest(code: Path) -> str:
    return sha256(code.read_bytes()).hexdigest()
