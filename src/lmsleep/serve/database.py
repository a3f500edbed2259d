"""An SQLite file whose changes are made whole or not at all, and whose readers never wait for a disk."""

import errno
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lmsleep.serve.errors import ApiError
from lmsleep.serve.log import LOG

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Unstored(ApiError):
    """Nothing was stored: there is no room (507), or the disk refuses (500); the log says how."""


def no_room() -> Unstored:
    """Return the error for a store that is full."""
    return Unstored(507, "the store is full; delete something, or come back later", code="storage_full")


@contextmanager
def storing() -> Iterator[None]:
    """Answer what disk and database raise without their words, which name paths; the log has them.

    Raises:
        Unstored: instead of `OSError` and `sqlite3.Error`.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        LOG.error("the store failed: %s: %s", type(error).__name__, error)
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_FULL or (isinstance(error, OSError) and error.errno in NO_ROOM):
            raise no_room() from error
        said = "the store cannot be read or written just now; the log of the server says why"
        raise Unstored(500, said, code="storage_failed") from error


class Database:
    """A connection that writes, one thread at a time, and one that reads beside it.

    Args:
        path: of the file, made if it is missing.
        tables: statements that make its tables, parted by blank lines.

    Raises:
        ValueError: if the file is no database.
        OSError: if it cannot be opened or written.
    """

    def __init__(self, path: Path, tables: str) -> None:
        self._writing, self._reading = threading.RLock(), threading.Lock()
        self._thread: int | None = None  # that makes changes
        self._later = list[Callable[[], None]]()
        self._mirror: Callable[[list[tuple[str, str, str]]], None] | None = None
        try:
            self._writer, self._reader = self._connect(path), self._connect(path)
            self._writer.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA synchronous = FULL")
            self._writer.execute("PRAGMA foreign_keys = ON")
            # What is deleted is overwritten.
            self._writer.execute("PRAGMA secure_delete = ON")
            self._writer.execute("BEGIN IMMEDIATE")
            if not self._writer.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in tables.split("\n\n"):
                    self._writer.execute(statement)
            self._writer.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is no store, or damaged ({error}); name another folder") from None

    def _connect(self, path: Path) -> sqlite3.Connection:
        return sqlite3.connect(path, check_same_thread=False, isolation_level=None)

    def mirror(self, tables: dict[str, str], to: Callable[[list[tuple[str, str, str]]], None]) -> None:
        """Call `to` with table, owner and key of all rows that changed, before every change is made for good.

        `tables` have a column `owner`, and a key by that name; uses of a stream are no change.
        """
        self._writer.execute("CREATE TEMP TABLE touched (tab TEXT, owner TEXT, key TEXT)")
        for table, key in tables.items():
            for change, row in (("INSERT", "new"), ("DELETE", "old"), ("UPDATE", "new")):
                columns = [row[1] for row in self._writer.execute(f"PRAGMA table_info({table})")]
                some = f" OF {', '.join(c for c in columns if c != 'used')}" if change == "UPDATE" else ""
                self._writer.execute(
                    f"CREATE TEMP TRIGGER touched_{table}_{change} AFTER {change}{some} ON {table} BEGIN "
                    f"INSERT INTO touched VALUES ('{table}', {row}.owner, {row}.{key}); END"
                )
        self._mirror = to

    def _tell(self, tells: bool) -> None:
        """Tell what has changed, if that is wanted."""
        if self._mirror is None:
            return
        touched = self.write("SELECT DISTINCT tab, owner, key FROM touched")
        self.write("DELETE FROM touched")
        if touched and tells:
            self._mirror(touched)

    @contextmanager
    def together(self, *, mirrored: bool = True) -> Iterator[None]:
        """Make all changes or none; what is begun within is part of it.

        `mirrored`: whether they are told (`mirror`).

        Raises:
            Unstored: if they cannot be written.
        """
        with self._writing:
            if self._thread is not None:
                yield
                return
            later = self._later = []
            with storing():
                if self._writer.in_transaction:  # one that could not be rolled back
                    self._writer.execute("ROLLBACK")
                self._writer.execute("BEGIN IMMEDIATE")
                self._thread = threading.get_ident()
                try:
                    yield
                    self._tell(mirrored)
                    self._writer.execute("COMMIT")
                except BaseException:
                    # SQLite may have rolled back by itself, and it may be unable to.
                    if self._writer.in_transaction:
                        with suppress(sqlite3.Error):
                            self._writer.execute("ROLLBACK")
                    raise
                finally:
                    self._thread = None
        for action in later:
            action()

    def later(self, action: Callable[[], None]) -> None:
        """Do something once the changes that are being made are on disk."""
        self._later.append(action)

    def write(self, change: str, values: Iterable[Any] = ()) -> list[Any]:
        """Change something within `together`; return the rows that the statement returns."""
        return self._writer.execute(change, tuple(values)).fetchall()

    def read(self, query: str, values: Iterable[Any] = ()) -> list[Any]:
        """Return rows: those on disk, within `together` also what it has changed.

        Raises:
            Unstored: if they cannot be read.
        """
        if self._thread == threading.get_ident():
            return self.write(query, values)
        with storing(), self._reading:
            return self._reader.execute(query, tuple(values)).fetchall()

    def tidy(self) -> None:
        """Give the disk back what deleted rows took, in the log of changes too."""
        with self._writing:
            self._writer.execute("PRAGMA incremental_vacuum").fetchall()
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Close both connections."""
        with self._writing, self._reading:
            self._reader.close()
            self._writer.close()
