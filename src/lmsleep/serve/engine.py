"""The loop of steps over all rows: requests join and leave in between, and sleeps run beside the answers.

Two threads use the model, one at a time (`Baton`): one writes answers and reads what leads up to them, the
other reads whole windows and sleeps on them. A row that is due goes over to the second and comes back, while
the others go on.

With a `debt` a question and its answer may run past the end of the window by so many tokens, attending to
all of them, before a sleep has to come. Then, or when the answer is over (`settled`), the window is slept on
where it ended and what followed is read anew. So the memory is that of a row without debt; only the tokens in
between have seen more.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from lmsleep.serve.baton import Baton, GivingWay
from lmsleep.session.answer import Piece
from lmsleep.session.rows import Odds, Row, advance
from lmsleep.sleep import Backbone, SleepConfig

What = Literal["read", "wrote", "sleeping", "slept", "done"]


class Busy(RuntimeError):
    """Too many requests wait already; nothing was begun."""


@dataclass(frozen=True, kw_only=True)
class Happened:
    """What became of a request in one step.

    Attributes:
        what: "read" (some of its tokens), "wrote", "sleeping" (due: it waits or sleeps), "slept", "done".
        row: as it is now.
        pieces: what was added to its answer.
        odds: of the token that was drawn, if they are kept.
    """

    what: What
    row: Row
    pieces: tuple[Piece, ...] = ()
    odds: Odds | None = None


Listener = Callable[[Happened], None]


@dataclass(eq=False)
class Request:
    """A row on its way through the engine.

    Attributes:
        row: as it is now.
        listener: called from the engine's threads with all that happens; must be quick and must not raise.
        left: whoever asked has gone: what is being read is read to its end, nothing more is written.
    """

    row: Row
    listener: Listener
    left: bool = False


@dataclass
class Counts:
    """What the engine has done so far; times in seconds."""

    steps: int = 0
    tokens_read: int = 0
    tokens_written: int = 0
    sleeps: int = 0
    seconds_asleep: float = 0.0
    broken: int = 0


class Engine:
    """Owns the model; rows go in, events come out.

    Args:
        model: any `Backbone`.
        sleep: how it sleeps, with one wake pass.
        portion: most tokens of prompts that one step reads while somebody waits for a next token.
        debt: tokens that a question and its answer may run past the end of the window.
        most_waiting: requests at a time, all together; more are refused.
        most_rows: rows in one step; those beyond wait for their turn.
        most_sleepers: rows that sleep together; the more, the longer others may wait for one block. Default 8
            on a GPU, and 1 on a CPU, where several take nearly as long as one after the other.
    """

    def __init__(
        self,
        model: Backbone,
        sleep: SleepConfig,
        *,
        portion: int = 64,
        debt: int = 0,
        most_waiting: int = 1024,
        most_rows: int = 64,
        most_sleepers: int | None = None,
    ) -> None:
        self.model, self.sleep = model, sleep
        self.portion, self.debt, self.most_waiting = portion, debt, most_waiting
        together = 1 if model.device.type == "cpu" else 8
        self.most_rows, self.most_sleepers = most_rows, most_sleepers or together
        self.counts = Counts()
        # What is written with debt is read as if the window were longer.
        self._indebted = replace(sleep, window=None if sleep.window is None else sleep.window + debt)
        self._baton = Baton()
        self._changed = threading.Condition()
        self._active, self._due = deque[Request](), deque[Request]()
        self._asleep: list[Request] = []
        self._closing = False
        self._threads = [
            threading.Thread(target=loop, name=f"lmsleep-{name}", daemon=True)
            for name, loop in (("answers", self._answer), ("sleeps", self._sleep))
        ]

    # From any thread

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    def submit(self, row: Row, listener: Listener) -> Request:
        """Let a row join.

        Raises:
            Busy: if there are too many already, or the engine is closing.
        """
        request = Request(row, listener)
        with self._changed:
            if self._closing:
                raise Busy("the server is shutting down")
            if self.waiting >= self.most_waiting:
                raise Busy(f"{self.most_waiting} requests are being answered or wait already")
            due = self._is_due(row)
            (self._due if due else self._active).append(request)
            if due:  # told with the lock held: nothing else may have happened before
                listener(Happened(what="sleeping", row=row))
            self._changed.notify_all()
        return request

    def leave(self, request: Request) -> None:
        """Let a row end early: it reads what it has begun to read, and writes nothing more."""
        with self._changed:
            request.left = True
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Count the requests that are not done."""
        return len(self._active) + len(self._due) + len(self._asleep)

    @property
    def states(self) -> dict[str, int]:
        """Count the requests that are awake, due to sleep, and asleep."""
        return {"awake": len(self._active), "due": len(self._due), "asleep": len(self._asleep)}

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, bring those that are there to their end, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout)

    # The thread that writes, and reads what leads up to it

    def _answer(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._active or (self._closing and not self.waiting))
                if not self._active:
                    return
                requests = self._choose()
            # Nobody waits for a next token: then prompts are read as fast as can be.
            most = self.portion if any(_writes(r.row) for r in requests) else None
            with self._baton.to_answer():
                rows = self._advance(self.model, self._indebted, [r.row for r in requests], most)
            self.counts.steps += 1
            for request, row in zip(requests, rows, strict=True):
                self._after(request, row, self._active)

    def _choose(self) -> list[Request]:
        """Choose who takes part in the next step; called with the lock held.

        All who write, and of those who read as many as fit the portion, those who came first before others.
        """
        writing = [r for r in self._active if _writes(r.row)]
        chosen, room = writing[: self.most_rows], self.portion
        for request in [r for r in self._active if not _writes(r.row)]:
            if len(chosen) == self.most_rows or (writing and room <= 0):
                break
            chosen.append(request)
            room -= len(request.row.unread)
        # Whoever has a turn goes to the end, so that nobody waits for ever.
        for request in chosen:
            self._active.remove(request)
            self._active.append(request)
        return chosen

    # The thread that reads whole windows and sleeps on them

    def _sleep(self) -> None:
        model = GivingWay(self.model, self._baton)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or (self._closing and not self.waiting))
                if not self._due:
                    return
                self._asleep += [self._due.popleft() for _ in range(min(len(self._due), self.most_sleepers))]
                requests = list(self._asleep)
            begin = time.perf_counter()
            with self._baton.to_sleep():
                rows = self._advance(model, self.sleep, [self._late(r.row) for r in requests], None)
            self.counts.seconds_asleep += time.perf_counter() - begin
            for request, row in zip(requests, rows, strict=True):
                self._after(request, row, self._asleep)

    def _late(self, row: Row) -> Row:
        """Return a row that has run past the end of its window as one that has not begun this window."""
        window = row.stream.window
        if self.sleep.window is None or len(window) <= self.sleep.window:
            return row
        return replace(row, stream=row.stream.reopened(), unread=torch.cat([window, row.unread]))

    # Both threads

    def _advance(
        self, model: Backbone, sleep: SleepConfig, rows: Sequence[Row], most: int | None
    ) -> list[Row]:
        try:
            return advance(model, sleep, rows, most=most)
        except Exception as error:  # whatever a model raises ends these requests, not the server
            return [replace(row, error=error) for row in rows]

    def _after(self, request: Request, row: Row, place: deque[Request] | list[Request]) -> None:
        """Put a request where it belongs after a step, and tell what happened."""
        before = request.row
        if request.left and row.budget:
            row = replace(row, budget=0)
        with self._changed:
            place.remove(request)
            request.row = row
            due = not row.done and self._is_due(row)
            if not row.done:
                (self._due if due else self._active).append(request)
            wrote, slept = row.answer is not before.answer, row.stream.sleeps - before.stream.sleeps
            self.counts.tokens_read += max(row.stream.tokens - before.stream.tokens, 0)
            self.counts.tokens_written += wrote
            self.counts.sleeps += max(slept, 0)
            self.counts.broken += row.error is not None
            self._changed.notify_all()
        what: What = "wrote" if wrote else "slept" if slept > 0 else "read"
        request.listener(Happened(what=what, row=row, pieces=row.pieces, odds=row.odds))
        if row.done:
            request.listener(Happened(what="done", row=row))
        elif due:
            request.listener(Happened(what="sleeping", row=row))

    def _is_due(self, row: Row) -> bool:
        """Say whether a row goes on with a sleep."""
        if row.done or self.sleep.window is None:
            return bool(row.nap) and not row.done
        if row.nap and not row.budget:
            return row.turn(self.sleep).passes > 0
        # Where nobody waits for an answer (a text that goes into a memory) nothing is gained by being late.
        answers = row.budget or row.answer.tokens or row.answer.stopped
        debt = self.debt if answers else 0
        return len(row.stream.window) + len(row.unread) > self.sleep.window + debt


def settled(row: Row, sleep: SleepConfig) -> Row | None:
    """Return a row that pays the debt of one that is done, or None if it has none."""
    window = row.stream.window
    if sleep.window is None or len(window) <= sleep.window:
        return None
    return Row(stream=row.stream.reopened(), unread=window)


def _writes(row: Row) -> bool:
    """Say whether somebody waits for what this row writes: at most the token drawn last is unread."""
    return len(row.unread) <= 1 and not row.nap
