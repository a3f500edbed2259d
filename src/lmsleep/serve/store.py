"""What outlives a request: streams, by id and by what they have read, in SQLite and memory files.

A stream is where its window began (`starts`: one memory file, shared by all streams of that window) and the
tokens of the window (a row). So a response more in the same window costs a row, and going on from an old one
costs nothing. Everything has an owner, and nothing is ever found by another one, shared prefixes included.
"""

import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmsleep.files import locked
from lmsleep.memory import model_identity
from lmsleep.session import Stream, saving
from lmsleep.session.stream import no_tokens, size
from lmsleep.sleep import Backbone, SleepConfig
from lmsleep.state import Origin

VERSION = 1
NO_TOKENS = no_tokens()
TABLES = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE starts (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, tokens INTEGER NOT NULL, sleeps INTEGER NOT NULL,
    chain BLOB, bytes INTEGER NOT NULL
);
CREATE INDEX starts_by_chain ON starts (owner, chain);
CREATE TABLE streams (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, start TEXT NOT NULL REFERENCES starts (id),
    window BLOB NOT NULL, used REAL NOT NULL
);
CREATE INDEX streams_by_start ON streams (start);
CREATE TABLE things (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, kind TEXT NOT NULL, stream TEXT REFERENCES streams (id),
    created REAL NOT NULL, body TEXT NOT NULL
);
CREATE INDEX things_by_owner ON things (owner, kind, created);
CREATE INDEX things_by_stream ON things (stream);
CREATE TABLE unread (
    thing TEXT PRIMARY KEY REFERENCES things (id) ON DELETE CASCADE, owner TEXT NOT NULL, tokens BLOB NOT NULL
);
"""


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
    """Streams and documents in a folder; one process at a time.

    Args:
        folder: made if it is missing.
        model: whose streams these are; those of another one are refused.
        sleep: how it sleeps, likewise.
        most_bytes: of states that are held in memory; those used last stay.

    Raises:
        ValueError: if another process has it, or it belongs to another model or sleep.
        OSError: if it cannot be written.
    """

    def __init__(self, folder: Path, model: Backbone, sleep: SleepConfig, *, most_bytes: int = 2**30) -> None:
        self.folder, self.model, self.sleep, self.most_bytes = folder, model, sleep, most_bytes
        self.starts = folder / "starts"
        self.starts.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._locked = locked(folder / "store")
        self._locked.__enter__()
        self._lock = threading.RLock()
        self._db = sqlite3.connect(folder / "store.sqlite", check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._recent = OrderedDict[str, Kept]()
        self._held = 0
        self.origin = Origin(model=model_identity(model))
        self._begin()

    def _begin(self) -> None:
        """Make the tables, or check whose they are; sweep what a kill has left."""
        about = {
            "version": str(VERSION),
            "model": self.origin.model or "",
            "sleep": json.dumps(self.sleep.to_dict()),
        }
        with self._changes():
            if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'about'").fetchone():
                for statement in TABLES.split(";"):
                    self._db.execute(statement)
                self._db.executemany("INSERT INTO about VALUES (?, ?)", about.items())
        found = dict(self._db.execute("SELECT key, value FROM about"))
        for key, value in about.items():
            if found.get(key) != value:
                self.close()
                raise ValueError(
                    f"{self.folder} is a store of another {key} ({found.get(key)}, not {value}); "
                    "name another folder"
                )
        known = {row[0] for row in self._db.execute("SELECT id FROM starts")}
        for path in self.starts.iterdir():
            if path.stem not in known:  # written, but its row was not
                path.unlink(missing_ok=True)

    @contextmanager
    def _changes(self) -> Iterator[None]:
        """Make all changes or none."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Let go of the folder."""
        with self._lock:
            self._db.close()
            self._locked.__exit__(None, None, None)

    # Streams

    def nothing(self) -> Kept:
        """Return a stream that has read nothing."""
        chain = hashlib.sha256(b"lmsleep").digest()
        return Kept("", "", chain, Stream.begin(self.model.initial_state(1)), NO_TOKENS)

    def keep(self, owner: str, before: Kept, read: Tensor, after: Stream) -> Kept:
        """Keep where a stream is now, and return it; written to disk before this returns.

        Args:
            owner: whose it is.
            before: where it came from.
            read: all tokens that it has read since, those of `before.unread` left out.
            after: where it is.

        Raises:
            ValueError: for a state with NaN.
            OSError: if it cannot be written; nothing is kept then.
        """
        name = secrets.token_hex(12)
        with self._changes():
            start, chain = self._start(owner, before, read, after)
            row = (name, owner, start, _blob(after.window), time.time())
            self._db.execute("INSERT INTO streams VALUES (?, ?, ?, ?, ?)", row)
        return self._remember(Kept(name, start, chain, after, NO_TOKENS))

    def settle(self, owner: str, kept: Kept, after: Stream) -> None:
        """Keep under the name of a stream what it is after a sleep that was due."""
        with self._changes():
            start, chain = self._start(owner, kept, NO_TOKENS, after)
            change = "UPDATE streams SET start = ?, window = ? WHERE id = ?"
            found = self._db.execute(change, (start, _blob(after.window), kept.id)).rowcount
        if found:  # it may have been deleted meanwhile
            self._remember(Kept(kept.id, start, chain, after, NO_TOKENS))
        self._sweep()

    def _start(self, owner: str, before: Kept, read: Tensor, after: Stream) -> tuple[str, bytes | None]:
        """Return name and chain of where the window of `after` began; written if it is new."""
        if after.sleeps == before.stream.sleeps:
            if before.start == "":
                self._db.execute("INSERT OR IGNORE INTO starts VALUES ('', '', 0, 0, ?, 0)", (before.chain,))
            return before.start, before.chain
        tokens, chain = torch.cat([before.window, read]), None
        slept_on = (after.sleeps - before.stream.sleeps) * (self.sleep.window or 1)
        # Only if every window was full: else the state is no function of the tokens alone.
        if before.chain is not None and len(tokens) - len(after.window) == slept_on:
            chain = self.chain(before.chain, tokens[:slept_on])[-1]
            where = "SELECT id FROM starts WHERE owner = ? AND chain = ?"
            if (row := self._db.execute(where, (owner, chain)).fetchone()) is not None:
                return str(row[0]), chain
        start = secrets.token_hex(12)
        self._write_start(owner, start, chain, after)
        return start, chain

    def _write_start(self, owner: str, start: str, chain: bytes | None, after: Stream) -> None:
        begun = Stream.begin(after.start, tokens=after.tokens - len(after.window), sleeps=after.sleeps)
        path = self._path(start)
        saving.write(path, begun, self._origin(begun), self.sleep, None)
        row = (start, owner, begun.tokens, begun.sleeps, chain, path.stat().st_size)
        self._db.execute("INSERT INTO starts VALUES (?, ?, ?, ?, ?, ?)", row)

    def _origin(self, stream: Stream) -> Origin:
        return Origin(
            model=self.origin.model, tokens=stream.tokens, sleeps=stream.sleeps, passes=self.sleep.passes
        )

    def _path(self, start: str) -> Path:
        return self.starts / f"{start}.mem"

    def chain(self, chain: bytes, tokens: Tensor) -> list[bytes]:
        """Return `chain`, and its continuation after each whole window of `tokens`."""
        chains = [chain]
        for window in tokens.split(self.sleep.window) if self.sleep.window else ():
            if len(window) == self.sleep.window:
                chains.append(hashlib.sha256(chains[-1] + window.numpy().tobytes()).digest())
        return chains

    def bring(self, owner: str, begun: Stream, window: Tensor | None = None) -> Kept:
        """Keep a stream that came from elsewhere: where its window began, and the tokens of the window.

        Raises:
            ValueError: as `keep`.
            OSError: as `keep`.
        """
        name, start = secrets.token_hex(12), secrets.token_hex(12)
        unread = NO_TOKENS if window is None else window
        with self._changes():
            self._write_start(owner, start, None, begun)
            row = (name, owner, start, _blob(unread), time.time())
            self._db.execute("INSERT INTO streams VALUES (?, ?, ?, ?, ?)", row)
        return self._remember(Kept(name, start, None, begun, unread))

    def position(self, owner: str, stream: str) -> tuple[int, int, int]:
        """Return tokens read, sleeps, and tokens in the open window of a stream; zeros if there is none."""
        with self._lock:
            row = self._db.execute(
                "SELECT b.tokens + length(s.window) / 8, b.sleeps, length(s.window) / 8 "
                "FROM streams s JOIN starts b ON b.id = s.start WHERE s.id = ? AND s.owner = ?",
                (stream, owner),
            ).fetchone()
        return (0, 0, 0) if row is None else (int(row[0]), int(row[1]), int(row[2]))

    def find(self, owner: str, stream: str) -> Kept | None:
        """Return a stream of this owner."""
        with self._lock:
            row = self._db.execute(
                "SELECT s.start, s.window, b.chain FROM streams s JOIN starts b ON b.id = s.start "
                "WHERE s.id = ? AND s.owner = ?",
                (stream, owner),
            ).fetchone()
            if row is None:
                return None
            self._db.execute("UPDATE streams SET used = ? WHERE id = ?", (time.time(), stream))
            if (kept := self._recent.get(stream)) is not None:
                self._recent.move_to_end(stream)
                return kept
        start, window, chain = row
        return self._from_disk(stream, start, chain, window)

    def _from_disk(self, name: str, start: str, chain: bytes | None, window: bytes) -> Kept:
        tokens = _tokens(window)
        if start == "":
            return Kept(name, start, chain, self.nothing().stream, tokens)
        state, origin, _, _ = saving.read(self._path(start), self.model, self.sleep)
        return Kept(
            name, start, chain, Stream.begin(state, tokens=origin.tokens, sleeps=origin.sleeps), tokens
        )

    def longest_prefix(self, owner: str, tokens: Tensor) -> tuple[Kept, int]:
        """Return the stream of this owner that has read most of the beginning of `tokens`, and how many.

        One token is always left, for something must predict the next one.
        """
        chains = self.chain(self.nothing().chain or b"", tokens[:-1])
        L = self.sleep.window or 0
        with self._lock:
            for count in range(len(chains) - 1, -1, -1):
                rest = tokens[count * L : -1].numpy().tobytes()
                row = self._db.execute(
                    "SELECT s.id, length(s.window) FROM streams s JOIN starts b ON b.id = s.start "
                    "WHERE s.owner = ? AND b.chain = ? AND length(s.window) <= ? "
                    "AND s.window = substr(?, 1, length(s.window)) ORDER BY length(s.window) DESC LIMIT 1",
                    (owner, chains[count], len(rest), rest),
                ).fetchone()
                if row is not None:
                    kept = self.find(owner, row[0])
                    assert kept is not None
                    return kept, count * L + row[1] // 8
        return self.nothing(), 0

    def _remember(self, kept: Kept) -> Kept:
        with self._lock:
            if (old := self._recent.pop(kept.id, None)) is not None:
                self._held -= size(old.stream.state)
            self._recent[kept.id] = kept
            self._held += size(kept.stream.state)
            while self._held > self.most_bytes and len(self._recent) > 1:
                _, old = self._recent.popitem(last=False)
                self._held -= size(old.stream.state)
        return kept

    # Documents

    def put(
        self, owner: str, kind: str, name: str, body: Mapping[str, Any], stream: str | None = None
    ) -> None:
        """Write a document, over an older one of that name and owner."""
        with self._changes():
            self._db.execute(
                "INSERT INTO things VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "stream = excluded.stream, body = excluded.body WHERE owner = excluded.owner",
                (name, owner, kind, stream, time.time(), json.dumps(body)),
            )

    def get(self, owner: str, kind: str, name: str) -> Thing | None:
        """Return a document of this owner."""
        with self._lock:
            row = self._db.execute(
                "SELECT id, kind, stream, created, body FROM things WHERE id = ? AND owner = ? AND kind = ?",
                (name, owner, kind),
            ).fetchone()
        return None if row is None else _thing(row)

    def all(self, owner: str, kind: str, most: int = 100, after: str = "") -> list[Thing]:
        """Return documents of this owner, the newest first, from the one after `after`."""
        with self._lock:
            rows = self._db.execute(
                "SELECT id, kind, stream, created, body FROM things WHERE owner = ?1 AND kind = ?2 "
                "AND (?3 = '' OR (created, id) < "
                "(SELECT created, id FROM things WHERE id = ?3 AND owner = ?1)) "
                "ORDER BY created DESC, id DESC LIMIT ?4",
                (owner, kind, after, most),
            ).fetchall()
        return [_thing(row) for row in rows]

    def delete(self, owner: str, kind: str, name: str) -> bool:
        """Delete a document and what nothing else needs any more: its stream, and where its window began."""
        with self._changes():
            row = self._db.execute(
                "DELETE FROM things WHERE id = ? AND owner = ? AND kind = ? RETURNING stream",
                (name, owner, kind),
            ).fetchone()
            if row is None:
                return False
            if row[0] is not None:
                self._drop_stream(row[0])
        self._sweep()
        return True

    def _drop_stream(self, stream: str) -> None:
        if self._db.execute("SELECT 1 FROM things WHERE stream = ?", (stream,)).fetchone():
            return
        self._db.execute("DELETE FROM streams WHERE id = ?", (stream,))
        if (kept := self._recent.pop(stream, None)) is not None:
            self._held -= size(kept.stream.state)

    def _sweep(self) -> None:
        """Remove starts that no stream needs: first their rows, then their files."""
        with self._changes():
            gone = self._db.execute(
                "DELETE FROM starts WHERE id NOT IN (SELECT start FROM streams) RETURNING id"
            ).fetchall()
        for (start,) in gone:
            if start:
                self._path(start).unlink(missing_ok=True)

    def forget(self, older_than: float) -> int:
        """Drop streams that no document holds and nobody has used since; return how many."""
        with self._changes():
            old = self._db.execute(
                "SELECT id FROM streams WHERE used < ? AND NOT EXISTS "
                "(SELECT 1 FROM things WHERE stream = streams.id)",
                (older_than,),
            ).fetchall()
            for (stream,) in old:
                self._drop_stream(stream)
        self._sweep()
        return len(old)

    def count(self, owner: str, kind: str) -> int:
        """Count documents of this owner."""
        with self._lock:
            found = self._db.execute(
                "SELECT count(*) FROM things WHERE owner = ? AND kind = ?", (owner, kind)
            )
            (number,) = found.fetchone()
        return int(number)

    # Texts that are being read

    def put_unread(self, owner: str, name: str, tokens: Tensor) -> None:
        """Remember what a document still has to read."""
        with self._changes():
            values = (name, owner, _blob(tokens))
            self._db.execute("INSERT OR REPLACE INTO unread VALUES (?, ?, ?)", values)

    def all_unread(self) -> list[tuple[str, str, Tensor]]:
        """Return owner, document and tokens of all that is still to be read."""
        with self._lock:
            rows = self._db.execute("SELECT owner, thing, tokens FROM unread").fetchall()
        return [(owner, thing, _tokens(tokens)) for owner, thing, tokens in rows]

    def progress(self, owner: str, name: str, stream: str, left: Tensor) -> None:
        """Give a document the stream that it has come to, and what it still has to read."""
        with self._changes():
            row = self._db.execute(
                "SELECT stream FROM things WHERE id = ? AND owner = ?", (name, owner)
            ).fetchone()
            self._db.execute("UPDATE things SET stream = ? WHERE id = ? AND owner = ?", (stream, name, owner))
            if len(left):
                self._db.execute("UPDATE unread SET tokens = ? WHERE thing = ?", (_blob(left), name))
            else:
                self._db.execute("DELETE FROM unread WHERE thing = ?", (name,))
            # Deleted meanwhile: then nobody needs the new one; else nobody needs the old one.
            self._drop_stream(stream if row is None else row[0])
        self._sweep()

    def fail(self, owner: str, name: str, body: Mapping[str, Any]) -> None:
        """Say what ended the reading of a document, which keeps the stream that it had come to."""
        with self._changes():
            change = "UPDATE things SET body = ? WHERE id = ? AND owner = ?"
            self._db.execute(change, (json.dumps(body), name, owner))
            self._db.execute("DELETE FROM unread WHERE thing = ?", (name,))

    def drop_unread(self, name: str) -> None:
        """Forget what a document still had to read."""
        with self._changes():
            self._db.execute("DELETE FROM unread WHERE thing = ?", (name,))

    def bytes(self, owner: str | None = None) -> dict[str, int]:
        """Count bytes in memory and on disk, of all owners or of one."""
        with self._lock:
            where, values = ("WHERE owner = ?", (owner,)) if owner is not None else ("", ())
            (disk,) = self._db.execute(
                f"SELECT coalesce(sum(bytes), 0) FROM starts {where}", values
            ).fetchone()
        return {"memory": self._held, "disk": disk}


def _thing(row: tuple[str, str, str | None, float, str]) -> Thing:
    name, kind, stream, created, body = row
    return Thing(name, kind, stream, created, json.loads(body))


def _blob(tokens: Tensor) -> bytes:
    return tokens.to(torch.int64).numpy().tobytes()


def _tokens(blob: bytes) -> Tensor:
    # An empty buffer is refused, and one that cannot be written to warned of.
    return torch.frombuffer(bytearray(blob), dtype=torch.int64) if blob else NO_TOKENS
