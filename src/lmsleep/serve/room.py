"""Room on disk: what is old leaves, and where bytes are short what was used longest ago.

Streams that no document holds leave first (they only save plain chat calls the reading), then responses and
compactions, whose ids clients hold and are then told that they are gone. Conversations and memories stay
until somebody deletes them.
"""

import time
from collections import Counter
from collections.abc import Callable

from lmsleep.serve.database import Database, no_room
from lmsleep.serve.errors import ApiError

PERISHABLE = "('response', 'compaction')"  # kinds of documents
AT_ONCE = 64  # streams that leave in one transaction: others wait no longer
SLACK = 0.9  # of the budget is left after it was reached, so that not every request has to make room

_HELD = "EXISTS (SELECT 1 FROM things t WHERE t.stream = s.id)"
_LASTING = f"EXISTS (SELECT 1 FROM things t WHERE t.stream = s.id AND t.kind NOT IN {PERISHABLE})"
_IN_ORDER = "(?1 IS NULL OR s.owner = ?1) AND s.used < ?2 AND s.id != ?3 ORDER BY s.used LIMIT ?4"
LOOSE = f"SELECT s.id FROM streams s WHERE NOT {_HELD} AND {_IN_ORDER}"
OLD = f"SELECT s.id FROM streams s WHERE NOT {_LASTING} AND {_IN_ORDER}"


class Clock:
    """Counts the seconds that a store has been open, all in all: no clock that jumps ages anything."""

    def __init__(self, before: float) -> None:
        self._before, self._began = before, time.monotonic()

    def now(self) -> float:
        """Return the seconds."""
        return self._before + time.monotonic() - self._began


class Room:
    """Makes room in a database of streams and documents.

    Args:
        db: has the tables of `Store`.
        drop: deletes a stream, within a transaction.
        note: writes down what was used lately.
        most_bytes: of all owners together; None: without limit.
        most_each: of one owner; None: without limit.
    """

    def __init__(
        self,
        db: Database,
        drop: Callable[[str], None],
        note: Callable[[], None],
        most_bytes: int | None,
        most_each: int | None,
    ) -> None:
        self.db, self.drop, self.note = db, drop, note
        self.most_bytes, self.most_each = most_bytes, most_each
        self.evicted = Counter[str]()  # streams, by why they left

    def taken(self, owner: str | None = None) -> int:
        """Count the bytes of memory files and rows, of all owners or of one."""
        query = "SELECT coalesce(sum(bytes), 0) FROM taken WHERE ?1 IS NULL OR owner = ?1"
        return int(self.db.read(query, (owner,))[0][0])

    def make(self, owner: str, need: int, spare: str = "") -> None:
        """See that so many bytes more fit; the stream `spare` stays.

        Raises:
            ApiError: 403 if they do not for this owner, 507 if they do not at all.
        """
        if not self._made(self.most_each, owner, need, spare):
            said = f"{self.most_each} bytes are in use; delete something"
            raise ApiError(403, said, code="quota_exceeded")
        if not self._made(self.most_bytes, None, need, spare):
            raise no_room()

    def _made(self, most: int | None, owner: str | None, need: int, spare: str) -> bool:
        if most is None or self.taken(owner) + need <= most:
            return True
        if need > most:  # for which nothing has to leave
            return False
        self.note()

        def enough() -> bool:
            return self.taken(owner) + need <= SLACK * most

        for query in (LOOSE, OLD):
            while not enough() and self._evict(query, owner, "room", spare=spare, enough=enough):
                pass
        return self.taken(owner) + need <= most

    def expire(self, before: float) -> int:
        """Let go of what was last used before then; return how many streams."""
        gone = 0
        while count := self._evict(OLD, None, "age", before=before):
            gone += count
        with self.db.together():  # what failed or was cancelled has no stream
            loose = f"stream IS NULL AND kind IN {PERISHABLE} AND used < ?"
            self.db.write(f"DELETE FROM things WHERE {loose}", (before,))
        return gone

    def _evict(
        self,
        query: str,
        owner: str | None,
        why: str,
        *,
        before: float = float("inf"),
        spare: str = "",
        enough: Callable[[], bool] = lambda: False,
    ) -> int:
        """Let some streams go, until it is enough; return how many."""
        gone = 0
        with self.db.together():
            for (stream,) in self.db.read(query, (owner, before, spare, AT_ONCE)):
                self.db.write("DELETE FROM things WHERE stream = ?", (stream,))
                self.drop(stream)
                gone += 1
                if enough():
                    break
        self.evicted[why] += gone
        return gone
