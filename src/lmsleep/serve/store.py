"""What outlives a request: streams, by id and by what they have read, in SQLite and memory files.

A stream is where its window began (`starts`: one memory file, shared by all streams of that window) and the
tokens of the window (a row). So a response more in the same window costs a row, and going on from an old one
costs nothing. Everything has an owner, and nothing is ever found by another one, shared prefixes included.
What was used last is in memory too, and comes from disk otherwise.
"""

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmsleep.files import locked, write_atomic
from lmsleep.memory import model_identity
from lmsleep.serve.database import Database, no_room, storing
from lmsleep.serve.errors import ApiError
from lmsleep.serve.log import LOG
from lmsleep.serve.recent import Recent
from lmsleep.serve.room import Clock, Room
from lmsleep.serve.shared import ORDER, Change, Shared
from lmsleep.session import Stream, saving
from lmsleep.session.stream import no_tokens, size
from lmsleep.sleep import Backbone, SleepConfig
from lmsleep.state import Origin
from lmsleep.text.tokenizers import check_tokens

VERSION = 1
DAY = 86400.0  # seconds
NO_TOKENS = no_tokens()
WIDTH = 4  # bytes of a token in a row
TABLES = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL)

CREATE TABLE starts (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, tokens INTEGER NOT NULL, sleeps INTEGER NOT NULL,
    chain BLOB, bytes INTEGER NOT NULL
)

CREATE INDEX starts_by_chain ON starts (owner, chain)

CREATE TABLE streams (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, start TEXT NOT NULL REFERENCES starts (id),
    window BLOB NOT NULL, used REAL NOT NULL
)

CREATE INDEX streams_by_window ON streams (start, owner, window)

CREATE INDEX streams_by_use ON streams (used)

CREATE TABLE things (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, kind TEXT NOT NULL,
    stream TEXT REFERENCES streams (id), created REAL NOT NULL, used REAL NOT NULL, body TEXT NOT NULL
)

CREATE INDEX things_by_owner ON things (owner, kind, number)

CREATE INDEX things_by_stream ON things (stream)

CREATE TABLE unread (
    thing TEXT PRIMARY KEY REFERENCES things (id) ON DELETE CASCADE, owner TEXT NOT NULL, tokens BLOB NOT NULL
)

CREATE TABLE taken (owner TEXT PRIMARY KEY, bytes INTEGER NOT NULL)
"""
# What each owner takes is counted with every change, so that asking for it costs nothing.
COUNTED = {
    "starts": "{row}.bytes",
    "streams": "length({row}.window)",
    "things": "length(CAST({row}.body AS BLOB))",
    "unread": "length({row}.tokens)",
}
# What several servers share of each table: all but what is this one's own.
KEYS = {"starts": "id", "streams": "id", "things": "id", "unread": "thing"}
COLUMNS = {
    "starts": "id, owner, tokens, sleeps, chain, bytes",
    "streams": "id, owner, start, window, used",
    "things": "id, owner, kind, stream, created, used, body",
    "unread": "thing, owner, tokens",
}
TRIGGER = """

CREATE TRIGGER {table}_{change} AFTER {change} ON {table} BEGIN
    INSERT INTO taken VALUES ({row}.owner, {bytes}) ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes;
END"""


def _tables() -> str:
    """Return the statements that make all tables."""
    made = TABLES.strip()
    for table, counted in COUNTED.items():
        new, old = counted.format(row="new"), counted.format(row="old")
        for change, row, bytes in (
            ("INSERT", "new", new),
            ("DELETE", "old", f"-{old}"),
            ("UPDATE", "new", f"{new} - {old}"),
        ):
            made += TRIGGER.format(table=table, change=change, row=row, bytes=bytes)
    return made


class Damaged(ApiError):
    """What is stored under a name cannot be read any more; nothing else is harmed."""

    def __init__(self, what: str, name: str, error: Exception) -> None:
        LOG.error("%s %s is damaged: %s: %s", what, name, type(error).__name__, error)
        super().__init__(500, f"what is stored of {what} {name!r} is damaged", code="damaged")


@dataclass(frozen=True, eq=False)
class Kept:
    """A stream in the store.

    Attributes:
        id: its name; "" for the one that has read nothing.
        start: the name of where its window began; "" for `S = 0`.
        chain: digest of all that was read before the window; None if a sleep came before its window was full.
        stream: the stream; where `unread` is not empty it stands where its window began.
        unread: tokens of its window, which must be read first.
    """

    id: str
    start: str
    chain: bytes | None
    stream: Stream
    unread: Tensor

    @property
    def window(self) -> Tensor:
        """Return the tokens of the open window."""
        return self.unread if len(self.unread) else self.stream.window

    @property
    def nbytes(self) -> int:
        """Count the bytes of its states."""
        stream = self.stream
        return size(stream.state) + (0 if stream.start is stream.state else size(stream.start))


@dataclass(frozen=True)
class Thing:
    """A document of an owner: a response, a conversation, a memory.

    Attributes:
        id: its name.
        kind: what it is.
        stream: the stream that belongs to it, if one does.
        created: seconds since 1970.
        body: what it says, as JSON.
    """

    id: str
    kind: str
    stream: str | None
    created: float
    body: dict[str, Any]


class Store:
    """Streams and documents in a folder; one process at a time. For any threads.

    Args:
        folder: made if it is missing.
        model: whose streams these are; those of another one are refused.
        sleep: how it sleeps, likewise.
        most_bytes: of states that are held in memory; those used last stay.
        most_disk: bytes of memory files and rows; None: without limit. `Room` says what leaves.
        most_each: the same of each owner.
        keep_days: how long streams, responses and compactions stay after they were last used; None: for ever.
            Days on which the store is not open do not count.
        shared: address of fsspec where several servers keep the same owners; the folder is then a copy, and
            begins empty.

    Raises:
        ValueError: if another process has it, or it belongs to another model or sleep, or is damaged.
        OSError: if it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        model: Backbone,
        sleep: SleepConfig,
        *,
        most_bytes: int = 2**30,
        most_disk: int | None = None,
        most_each: int | None = None,
        keep_days: float | None = None,
        shared: str | None = None,
    ) -> None:
        self.folder, self.model, self.sleep, self.keep_days = folder, model, sleep, keep_days
        self._starts, self.scratch = folder / "starts", folder / "scratch"
        self._starts.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._locked = locked(folder / "store")
        self._locked.__enter__()
        try:
            self._db = Database(folder / "store.sqlite", _tables())
            self.origin = Origin(model=model_identity(model))
            about = self._about()
            self._check(about)
            self.shared = None if shared is None else Shared(shared, about)
            self._taking = threading.Lock()
            if self.shared is not None:
                self._db.mirror(KEYS, self._share)
                with self._db.together(mirrored=False):
                    for table in reversed(ORDER):
                        self._db.write(f"DELETE FROM {table}")
            self._clean()
        except BaseException:
            self._locked.__exit__(None, None, None)
            raise
        self.recent = Recent[Kept](most_bytes)
        self.room = Room(self._db, self._drop_stream, self._note_use, most_disk, most_each)
        (served,) = self._db.read("SELECT CAST(value AS REAL) FROM about WHERE key = 'served'") or [(0.0,)]
        (used,) = self._db.read("SELECT coalesce(max(used), 0.0) FROM streams")
        self._clock = Clock(max(*served, *used))  # a kill loses what was not noted yet
        self._used = dict[str, float]()  # streams, and when they were used; on disk with the next sweep

    def _about(self) -> dict[str, str]:
        """Say what the store can be gone on with."""
        sleep = json.dumps(self.sleep.to_dict())
        return {"version": str(VERSION), "model": self.origin.model or "", "sleep": sleep}

    def _check(self, about: dict[str, str]) -> None:
        """Say whose the store is, or check it."""
        with self._db.together():
            for item in about.items():
                self._db.write("INSERT OR IGNORE INTO about VALUES (?, ?)", item)
        found = dict(self._db.read("SELECT key, value FROM about"))
        for key, value in about.items():
            if found[key] != value:
                self._db.close()
                raise ValueError(
                    f"{self.folder} is a store of another {key} ({found[key]}, not {value}); "
                    "name another folder"
                )

    def _clean(self) -> None:
        """Remove the files that a kill has left."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(mode=0o700)
        known = {row[0] for row in self._db.read("SELECT id FROM starts")}
        for path in self._starts.glob("*/*"):
            if path.stem not in known:  # written, but its row was not; or deleted, but its file was not
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the folder."""
        with suppress(ApiError):
            self._note_use()
        self._db.close()
        self._locked.__exit__(None, None, None)

    def together(self) -> AbstractContextManager[None]:
        """Make all changes within, or none."""
        return self._db.together()

    def check_writable(self) -> None:
        """Try to write.

        Raises:
            Unstored: if that fails.
        """
        with storing():
            path = self.scratch / secrets.token_hex(12)
            path.write_bytes(bytes(4096))
            path.unlink()
        self._note_use()

    # Several servers

    def take(self, owner: str) -> bool:
        """Hold an owner, and have all that any server kept of it; say whether another one held it before.

        Raises:
            ApiError: if the shared place cannot be reached.
        """
        if self.shared is None:
            return False
        with self._taking, storing():
            if self.shared.holds(owner):
                return False
            self.shared.hold(owner)
            found = sorted(self.shared.changes(owner), key=_in_order)
            query = "SELECT id FROM {} WHERE owner = ?"
            streams, starts = (self._db.read(query.format(t), (owner,)) for t in ("streams", "starts"))
            with self._db.together(mirrored=False):
                for table in reversed(ORDER):
                    self._db.write(f"DELETE FROM {table} WHERE owner = ?", (owner,))
                self._begin_with_nothing()
                for change in found:
                    assert change.cells is not None
                    # The number of a document is this store's own, and so is when something was used.
                    places = ", ".join("?" * len(change.cells))
                    self._db.write(
                        f"INSERT INTO {change.table} ({COLUMNS[change.table]}) VALUES ({places})",
                        change.cells,
                    )
                for table in ("streams", "things"):
                    now = (self._clock.now(), owner)
                    self._db.write(f"UPDATE {table} SET used = ? WHERE owner = ?", now)
            for (stream,) in streams:
                self.recent.drop(stream)
            for (start,) in starts:
                self._remove(start)  # what is still needed of them is fetched
        return True

    def _share(self, touched: list[tuple[str, str, str]]) -> None:
        """Write rows that are about to change to where all servers find them.

        Raises:
            ApiError: if another server has taken their owner over.
            OSError: if they cannot be written.
        """
        assert self.shared is not None
        changes = []
        for table, owner, key in touched:
            rows = self._db.read(f"SELECT {COLUMNS[table]} FROM {table} WHERE {KEYS[table]} = ?", (key,))
            changes.append(Change(table, owner, key, rows[0] if rows else None))
        self.shared.write(changes, self._path)

    def _file(self, owner: str, start: str) -> Path:
        """Return the file of a start, fetched if another server wrote it."""
        path = self._path(start)
        if self.shared is not None and not path.exists():
            path.parent.mkdir(exist_ok=True, mode=0o700)
            write_atomic(path, self.shared.fetch(owner, start))
        return path

    # Streams

    def nothing(self) -> Kept:
        """Return a stream that has read nothing."""
        chain = hashlib.sha256(b"lmsleep").digest()
        return Kept("", "", chain, Stream.begin(self.model.initial_state(1).detach()), NO_TOKENS)

    def keep(self, owner: str, before: Kept, read: Tensor, after: Stream) -> Kept:
        """Keep where a stream is now, and return it; written to disk before this returns.

        Args:
            owner: whose it is.
            before: where it came from.
            read: all tokens that it has read since, those of `before.unread` left out.
            after: where it is.

        Raises:
            ValueError: for a state with NaN.
            ApiError: if it cannot be written; nothing is kept then.
        """
        name, window = secrets.token_hex(12), _blob(after.window)
        with self._started(owner, before, read, after, len(window)) as (start, chain):
            row = (name, owner, start, window, self._clock.now())
            self._db.write("INSERT INTO streams VALUES (?, ?, ?, ?, ?)", row)
        return self._remember(Kept(name, start, chain, after, NO_TOKENS))

    def settle(self, owner: str, kept: Kept, after: Stream) -> None:
        """Keep under the name of a stream what it is after a sleep that was due.

        Raises:
            ApiError: as `keep`; it then stays as it is.
        """
        with self._started(owner, kept, NO_TOKENS, after, 0) as (start, chain):
            change = "UPDATE streams SET start = ?, window = ? WHERE id = ? RETURNING id"
            found = self._db.write(change, (start, _blob(after.window), kept.id))
            self._drop_start(kept.start)
            self._drop_start(start)  # the stream may have been deleted meanwhile
        if found:
            self._remember(Kept(kept.id, start, chain, after, NO_TOKENS))

    @contextmanager
    def _started(
        self, owner: str, before: Kept, read: Tensor, after: Stream, need: int
    ) -> Iterator[tuple[str, bytes | None]]:
        """Yield name and chain of where the window of `after` began, written if new; in a transaction."""
        chain = self._continued(before, read, after)
        same = before.start if after.sleeps == before.stream.sleeps else None
        found = "" if same == "" else self._present(owner, same, chain)
        if found is not None:
            self.room.make(owner, need)
            with self._db.together():
                if found == "":
                    self._begin_with_nothing()
                # It may have left while there was no lock: then it is written again.
                if self._db.read("SELECT 1 FROM starts WHERE id = ?", (found,)):
                    yield found, chain
                    return
        begun = Stream.begin(after.start, tokens=after.tokens - len(after.window), sleeps=after.sleeps)
        with self._written(owner, chain, begun, need) as start:
            yield start, chain

    def _begin_with_nothing(self) -> None:
        """See that the start of all streams is there, within a transaction."""
        nothing = self.nothing().chain
        self._db.write("INSERT OR IGNORE INTO starts VALUES ('', '', 0, 0, ?, 0)", (nothing,))

    def _continued(self, before: Kept, read: Tensor, after: Stream) -> bytes | None:
        """Return the chain of where the window of `after` began."""
        if after.sleeps == before.stream.sleeps or before.chain is None:
            return before.chain
        tokens = torch.cat([before.window, read])
        slept_on = (after.sleeps - before.stream.sleeps) * (self.sleep.window or 1)
        # Only if every window was full: else the state is no function of the tokens alone.
        if len(tokens) - len(after.window) != slept_on:
            return None
        return self.chain(before.chain, tokens[:slept_on])[-1]

    def _present(self, owner: str, start: str | None, chain: bytes | None) -> str | None:
        """Return a start of this name or this chain whose file is there."""
        rows = self._db.read(
            "SELECT id, bytes FROM starts WHERE id = ?1 UNION SELECT id, bytes FROM starts "
            "WHERE ?1 IS NULL AND owner = ?2 AND chain = ?3",
            (start, owner, chain),
        )
        for name, count in rows:
            with suppress(OSError):
                if self._file(owner, name).stat().st_size == count:
                    return str(name)
        return None

    @contextmanager
    def _written(self, owner: str, chain: bytes | None, begun: Stream, need: int) -> Iterator[str]:
        """Write where a window began, and yield its name in a transaction; a failure leaves no file."""
        start = secrets.token_hex(12)
        path = self._path(start)
        try:
            with storing():
                path.parent.mkdir(exist_ok=True, mode=0o700)
                # Before others have to wait: this takes longest.
                saving.write(path, begun, self._origin(begun), self.sleep, None)
                _sync(path.parent)
                count = path.stat().st_size
            self.room.make(owner, need + count)
            with self._db.together():
                row = (start, owner, begun.tokens, begun.sleeps, chain, count)
                self._db.write("INSERT INTO starts VALUES (?, ?, ?, ?, ?, ?)", row)
                yield start
        except BaseException:
            self._remove(start)
            raise

    def _origin(self, stream: Stream) -> Origin:
        return Origin(
            model=self.origin.model, tokens=stream.tokens, sleeps=stream.sleeps, passes=self.sleep.passes
        )

    def _path(self, start: str) -> Path:
        # Many folders: one of a million files is slow to write to.
        return self._starts / start[:2] / f"{start}.mem"

    def _remove(self, start: str) -> None:
        try:
            self._path(start).unlink(missing_ok=True)
        except OSError as error:  # swept with the next start
            LOG.error("the file of a state could not be removed: %s", error)

    def chain(self, chain: bytes, tokens: Tensor) -> list[bytes]:
        """Return `chain`, and its continuation after each whole window of `tokens`."""
        chains = [chain]
        for window in tokens.split(self.sleep.window) if self.sleep.window else ():
            if len(window) == self.sleep.window:
                chains.append(hashlib.sha256(chains[-1] + window.numpy().tobytes()).digest())
        return chains

    def bring(self, owner: str, begun: Stream, window: Tensor = NO_TOKENS) -> Kept:
        """Keep a stream that came from elsewhere: where its window began, and the tokens of the window.

        Raises:
            ValueError: as `keep`.
            ApiError: as `keep`.
        """
        name, blob = secrets.token_hex(12), _blob(window)
        with self._written(owner, None, begun, len(blob)) as start:
            row = (name, owner, start, blob, self._clock.now())
            self._db.write("INSERT INTO streams VALUES (?, ?, ?, ?, ?)", row)
        return self._remember(Kept(name, start, None, begun, window))

    def position(self, owner: str, stream: str) -> tuple[int, int, int]:
        """Return tokens read, sleeps, and tokens in the open window of a stream; zeros if there is none."""
        rows = self._db.read(
            "SELECT b.tokens + length(s.window) / ?3, b.sleeps, length(s.window) / ?3 "
            "FROM streams s JOIN starts b ON b.id = s.start WHERE s.id = ?1 AND s.owner = ?2",
            (stream, owner, WIDTH),
        )
        return rows[0] if rows else (0, 0, 0)

    def find(self, owner: str, stream: str) -> Kept | None:
        """Return a stream of this owner.

        Raises:
            ApiError: if its file or row is damaged.
        """
        query = (
            "SELECT s.start, s.window, b.chain FROM streams s JOIN starts b ON b.id = s.start "
            "WHERE s.id = ? AND s.owner = ?"
        )
        if not (rows := self._db.read(query, (stream, owner))):
            return None
        self._used[stream] = self._clock.now()
        if (kept := self.recent.get(stream)) is not None:
            return kept
        ((start, window, chain),) = rows
        try:
            kept = self._from_disk(owner, stream, start, chain, window)
        except (ValueError, OSError) as error:
            if self._db.read(query, (stream, owner)) != rows:  # changed or deleted meanwhile
                return self.find(owner, stream)
            with suppress(ApiError), self._db.together():
                # So that nothing that reads the same begins with it.
                self._db.write("UPDATE starts SET chain = NULL WHERE id = ? AND id != ''", (start,))
            raise Damaged("stream", stream, error) from None
        return self._remember(kept)

    def _from_disk(self, owner: str, name: str, start: str, chain: bytes | None, window: bytes) -> Kept:
        tokens = _tokens(window)
        check_tokens(tokens, self.model.vocab_size)
        if start == "":
            return Kept(name, start, chain, self.nothing().stream, tokens)
        state, origin, _, _ = saving.read(self._file(owner, start), self.model, self.sleep)
        begun = Stream.begin(state, tokens=origin.tokens, sleeps=origin.sleeps)
        return Kept(name, start, chain, begun, tokens)

    def longest_prefix(self, owner: str, tokens: Tensor) -> tuple[Kept, int]:
        """Return the stream of this owner that has read most of the beginning of `tokens`, and how many.

        One token is always left, for something must predict the next one.
        """
        chains = self.chain(self.nothing().chain or b"", tokens[:-1])
        L = self.sleep.window or 0
        for count in range(len(chains) - 1, -1, -1):
            rest = _blob(tokens[count * L : -1])
            starts = "SELECT id FROM starts WHERE owner IN (?, '') AND chain = ?"
            for (start,) in self._db.read(starts, (owner, chains[count])):
                # What is damaged, or has just left, is read anew.
                with suppress(Damaged):
                    found = self._longest_window(owner, start, rest)
                    if found is not None and (kept := self.find(owner, found)) is not None:
                        return kept, count * L + len(kept.window)
        return self.nothing(), 0

    def _longest_window(self, owner: str, start: str, rest: bytes) -> str | None:
        """Return the stream of a start whose window is the longest that `rest` begins with."""
        query = (
            "SELECT id, window FROM streams WHERE start = ? AND owner = ? AND window <= ? "
            "ORDER BY window DESC LIMIT 1"
        )
        bound = rest
        while rows := self._db.read(query, (start, owner, bound)):
            ((name, window),) = rows
            if rest.startswith(window):
                return str(name)
            # Whatever `rest` begins with and is longer than what both share would have come before this one.
            shared = next(i for i, (a, b) in enumerate(zip(rest, window, strict=False)) if a != b)
            bound = rest[: shared - shared % WIDTH]
        return None

    def _remember(self, kept: Kept) -> Kept:
        self.recent.put(kept.id, kept)
        return kept

    # Documents

    def put(
        self, owner: str, kind: str, name: str, body: Mapping[str, Any], stream: str | None = None
    ) -> None:
        """Write a document, over an older one of that name and owner.

        Raises:
            ApiError: if there is no room, or it cannot be written.
        """
        said = json.dumps(body)
        self.room.make(owner, len(said), stream or "")
        with self._db.together():
            if stream is not None and not self._db.read("SELECT 1 FROM streams WHERE id = ?", (stream,)):
                raise no_room()  # it was kept, and had to leave at once
            row = (name, owner, kind, stream, time.time(), self._clock.now(), said)
            self._db.write(
                "INSERT INTO things (id, owner, kind, stream, created, used, body) "
                "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "stream = excluded.stream, body = excluded.body WHERE owner = excluded.owner",
                row,
            )

    def get(self, owner: str, kind: str, name: str) -> Thing | None:
        """Return a document of this owner.

        Raises:
            ApiError: if its row is damaged.
        """
        rows = self._db.read(
            "SELECT id, kind, stream, created, body FROM things WHERE id = ? AND owner = ? AND kind = ?",
            (name, owner, kind),
        )
        return _thing(rows[0]) if rows else None

    def all(self, owner: str, kind: str, most: int = 100, after: str = "") -> list[Thing]:
        """Return documents of this owner, the newest first, from the one after `after`; no damaged ones."""
        rows = self._db.read(
            "SELECT id, kind, stream, created, body FROM things WHERE owner = ?1 AND kind = ?2 "
            "AND (?3 = '' OR number < (SELECT number FROM things WHERE id = ?3 AND owner = ?1)) "
            "ORDER BY number DESC LIMIT ?4",
            (owner, kind, after, most),
        )
        found = []
        for row in rows:
            with suppress(Damaged):
                found.append(_thing(row))
        return found

    def delete(self, owner: str, kind: str, name: str) -> bool:
        """Delete a document and what nothing else needs any more: its stream, and where its window began."""
        if self.shared is not None:
            with storing():
                self.shared.check(owner)
        with self._db.together():
            rows = self._db.write(
                "DELETE FROM things WHERE id = ? AND owner = ? AND kind = ? RETURNING stream",
                (name, owner, kind),
            )
            if rows and rows[0][0] is not None:
                self._drop_stream(rows[0][0])
        return bool(rows)

    def _drop_stream(self, stream: str) -> None:
        """Delete a stream that no document holds, within a transaction."""
        if self._db.read("SELECT 1 FROM things WHERE stream = ?", (stream,)):
            return
        for (start,) in self._db.write("DELETE FROM streams WHERE id = ? RETURNING start", (stream,)):
            self._drop_start(start)
        self._db.later(lambda: self.recent.drop(stream))

    def _drop_start(self, start: str) -> None:
        """Delete a start that no stream needs: first its row, then its file."""
        gone = self._db.write(
            "DELETE FROM starts WHERE id = ?1 "
            "AND NOT EXISTS (SELECT 1 FROM streams WHERE start = ?1) RETURNING id",
            (start,),
        )
        if gone and start:
            self._db.later(lambda: self._remove(start))

    def sweep(self) -> int:
        """Let go of what was not used for `keep_days`, and of its place on disk; return how many streams.

        Raises:
            ApiError: if the store cannot be written.
        """
        self._note_use()
        gone = 0
        if self.keep_days is not None:
            gone = self.room.expire(self._clock.now() - self.keep_days * DAY)
        self._db.tidy()
        return gone

    def _note_use(self) -> None:
        """Write down what was used since the last time, and how long the store has been open."""
        used, self._used = self._used, {}
        with self._db.together():
            for stream, when in used.items():
                self._db.write("UPDATE streams SET used = ? WHERE id = ?", (when, stream))
            served = ("served", str(self._clock.now()))
            self._db.write("INSERT OR REPLACE INTO about VALUES (?, ?)", served)

    def count(self, owner: str, kind: str) -> int:
        """Count documents of this owner."""
        query = "SELECT count(*) FROM things WHERE owner = ? AND kind = ?"
        return int(self._db.read(query, (owner, kind))[0][0])

    # Texts that are being read

    def put_unread(self, owner: str, name: str, tokens: Tensor) -> None:
        """Remember what a document still has to read.

        Raises:
            ApiError: as `put`.
        """
        blob = _blob(tokens)
        self.room.make(owner, len(blob))
        with self._db.together():
            self._db.write(
                "INSERT INTO unread VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET tokens = excluded.tokens",
                (name, owner, blob),
            )

    def all_unread(self, owner: str | None = None) -> list[tuple[str, str, int]]:
        """Return owner, name and number of tokens of what still has something to read, of all or of one."""
        query = "SELECT owner, thing, length(tokens) / ? FROM unread WHERE ?2 IS NULL OR owner = ?2"
        return self._db.read(query, (WIDTH, owner))

    def unread(self, name: str) -> Tensor | None:
        """Return what a document still has to read.

        Raises:
            ApiError: if it is damaged.
        """
        rows = self._db.read("SELECT tokens FROM unread WHERE thing = ?", (name,))
        try:
            tokens = _tokens(rows[0][0]) if rows else None
            if tokens is not None:
                check_tokens(tokens, self.model.vocab_size)
        except ValueError as error:
            raise Damaged("text", name, error) from None
        return tokens

    def progress(self, owner: str, name: str, stream: str, left: Tensor) -> None:
        """Give a document the stream that it has come to, and what it still has to read."""
        with self._db.together():
            rows = self._db.write("SELECT stream FROM things WHERE id = ? AND owner = ?", (name, owner))
            self._db.write("UPDATE things SET stream = ? WHERE id = ? AND owner = ?", (stream, name, owner))
            if len(left):
                self._db.write("UPDATE unread SET tokens = ? WHERE thing = ?", (_blob(left), name))
            else:
                self._db.write("DELETE FROM unread WHERE thing = ?", (name,))
            # Deleted meanwhile: then nobody needs the new one; else nobody needs the old one.
            self._drop_stream(rows[0][0] if rows else stream)

    def fail(self, owner: str, name: str, body: Mapping[str, Any]) -> None:
        """Say what ended the reading of a document, which keeps the stream that it had come to."""
        with self._db.together():
            change = "UPDATE things SET body = ? WHERE id = ? AND owner = ?"
            self._db.write(change, (json.dumps(body), name, owner))
            self._db.write("DELETE FROM unread WHERE thing = ?", (name,))

    def drop_unread(self, name: str) -> None:
        """Forget what a document still had to read."""
        with self._db.together():
            self._db.write("DELETE FROM unread WHERE thing = ?", (name,))

    def streams(self) -> dict[str, int]:
        """Count the streams that are in memory, and all of them, which are on disk."""
        return {"memory": len(self.recent), "disk": int(self._db.read("SELECT count(*) FROM streams")[0][0])}

    def bytes(self, owner: str | None = None) -> dict[str, int]:
        """Count bytes in memory, of all owners, and on disk, of all or of one."""
        return {"memory": self.recent.nbytes, "disk": self.room.taken(owner)}


def _in_order(change: Change) -> tuple[int, Any]:
    """Sort rows by what they refer to, and documents by when they were made."""
    assert change.cells is not None
    return ORDER.index(change.table), change.cells[4] if change.table == "things" else 0


def _thing(row: Any) -> Thing:
    name, kind, stream, created, body = row
    try:
        return Thing(name, kind, stream, created, dict(json.loads(body)))
    except (ValueError, TypeError) as error:
        raise Damaged(kind, name, error) from None


def _sync(folder: Path) -> None:
    """See that the names in a folder are on disk."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _blob(tokens: Tensor) -> bytes:
    return tokens.to(torch.int32).numpy().tobytes()


def _tokens(blob: bytes) -> Tensor:
    # An empty buffer is refused, and one that cannot be written to warned of.
    return torch.frombuffer(bytearray(blob), dtype=torch.int32).long() if blob else NO_TOKENS
