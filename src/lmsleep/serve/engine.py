"""The loop of steps over all rows: requests join and leave in between, and sleeps run beside the answers.

Two threads use the model, one at a time (`Baton`): one writes answers and reads what leads up to them, the
other reads whole windows and sleeps on them. A row that is due goes over to the second and comes back, while
the others go on.

With a `debt` an answer may run past the end of its window by so many tokens, attending to all of them, before
a sleep has to come; a question too where `debt_of` is "turn". Then, or when the answer is over (`settled`),
the window is slept on where it ended and what followed is read anew. So the memory is that of a row without
debt; only the tokens in between have seen more. What a question asks about is slept on first by default, as
in a session: models that were taught to answer after a sleep need it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from lmsleep.serve.baton import Baton, GivingWay
from lmsleep.serve.log import LOG
from lmsleep.session.answer import Piece
from lmsleep.session.rows import Odds, Row, advance
from lmsleep.session.stream import size
from lmsleep.sleep import Backbone, SleepConfig
from lmsleep.training.device import is_out_of_memory

DebtOf = Literal["answer", "turn"]
What = Literal["read", "wrote", "sleeping", "slept", "done"]


class Busy(RuntimeError):
    """Too many requests wait already; nothing was begun."""


class Closing(RuntimeError):
    """The engine ends, or has ended; nothing was begun."""


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
        listener: called from the engine's threads with all that happens; must be quick.
        left: whoever asked has gone: it takes no further step.
        stepping: it takes part in a step just now.
        came: when, by `time.perf_counter`; None once it has begun.
    """

    row: Row
    listener: Listener
    left: bool = False
    stepping: bool = False
    came: float | None = field(default_factory=time.perf_counter)

    def tell(self, event: Happened) -> None:
        """Call the listener."""
        try:
            self.listener(event)
        except Exception:  # of one request; the engine has others
            LOG.exception("a listener failed")


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
        debt: tokens that an answer may run past the end of the window.
        debt_of: "answer"; or "turn": a question may run into debt as well.
        most_waiting: requests at a time, all together; more are refused.
        most_rows: rows in one step; those beyond wait for their turn.
        most_sleepers: rows that sleep together; the more, the longer others may wait for one block. Default 8
            on a GPU, and 1 on a CPU, where several take nearly as long as one after the other.

    Attributes:
        timed: is called with "queue" and the seconds that a request waited for its first step, and with
            "sleep" and the seconds that a sleep of one or several rows took.
        failed: whether it has ended by a fault of its own.

    Where memory runs out `most_rows` or `most_sleepers` is lowered to what may fit, until the engine ends.
    """

    def __init__(
        self,
        model: Backbone,
        sleep: SleepConfig,
        *,
        portion: int = 32,
        debt: int = 0,
        debt_of: DebtOf = "answer",
        most_waiting: int = 1024,
        most_rows: int = 64,
        most_sleepers: int | None = None,
    ) -> None:
        self.model, self.sleep = model, sleep
        self.portion, self.debt, self.most_waiting = portion, debt, most_waiting
        self.debt_of = debt_of
        together = 1 if model.device.type == "cpu" else 8
        self.most_rows, self.most_sleepers = most_rows, most_sleepers or together
        self.counts = Counts()
        self.timed: Callable[[Literal["queue", "sleep"], float], None] = lambda what, seconds: None
        # What is written with debt is read as if the window were longer.
        self._indebted = replace(sleep, window=None if sleep.window is None else sleep.window + debt)
        self._baton = Baton()
        self._changed = threading.Condition()
        self._active, self._due = deque[Request](), deque[Request]()
        self._asleep: list[Request] = []
        self._closing = self.failed = False
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"lmsleep-{name}", daemon=True)
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
            Busy: if there are too many already.
            Closing: if the engine ends.
        """
        request = Request(row, listener)
        with self._changed:
            if self._closing:
                raise Closing("the engine takes no more requests")
            if self.waiting >= self.most_waiting:
                raise Busy(f"{self.most_waiting} requests are being answered or wait already")
            due = self._is_due(row)
            (self._due if due else self._active).append(request)
            if due:  # told with the lock held: nothing else may have happened before
                request.tell(Happened(what="sleeping", row=row))
            self._changed.notify_all()
        return request

    def leave(self, request: Request) -> None:
        """Let a row end early: after the step that it takes just now, or at once."""
        with self._changed:
            request.left = True
            waited = not request.stepping and self._remove(request)
            self._changed.notify_all()
        if waited:
            request.tell(Happened(what="done", row=_ended(request.row)))

    def _remove(self, request: Request) -> bool:
        """Take a request from where it waits, with the lock held; say whether it did."""
        for place in (self._active, self._due):
            if request in place:
                place.remove(request)
                return True
        return False

    @property
    def waiting(self) -> int:
        """Count the requests that are not done."""
        with self._changed:  # a request on its way from one place to another is in neither
            return len(self._active) + len(self._due) + len(self._asleep)

    @property
    def states(self) -> dict[str, int]:
        """Count the requests that are awake, due to sleep, and asleep."""
        with self._changed:
            return {"awake": len(self._active), "due": len(self._due), "asleep": len(self._asleep)}

    @property
    def state_bytes(self) -> int:
        """Count the bytes of the states of requests that are not done."""
        with self._changed:
            rows = [request.row for request in (*self._active, *self._due, *self._asleep)]
        return sum(row.stream.nbytes + size(row.stream.start) for row in rows)

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

    def _step(self, requests: Sequence[Request]) -> None:
        """Note that requests begin a step; called with the lock held."""
        for request in requests:
            request.stepping = True
            if request.came is not None:
                self.timed("queue", time.perf_counter() - request.came)
                request.came = None

    def _choose(self) -> list[Request]:
        """Choose who takes part in the next step; called with the lock held.

        All who write, and of those who read as many as fit the portion, those who came first before others.
        """
        writing = [r for r in self._active if _writes(r.row)]
        # Reading may take about as long as writing does: the more write, the less they feel it.
        chosen, room = writing[: self.most_rows], max(self.portion, 4 * len(writing))
        for request in [r for r in self._active if not _writes(r.row)]:
            if len(chosen) == self.most_rows or (writing and room <= 0):
                break
            chosen.append(request)
            room -= len(request.row.unread)
        # Whoever has a turn goes to the end, so that nobody waits for ever.
        for request in chosen:
            self._active.remove(request)
            self._active.append(request)
        self._step(chosen)
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
                self._step(requests)
            begin = time.perf_counter()
            with self._baton.to_sleep():
                rows = self._advance(model, self.sleep, [self._late(r.row) for r in requests], None)
            seconds = time.perf_counter() - begin
            self.counts.seconds_asleep += seconds
            self.timed("sleep", seconds)
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
        """Take each row one step further; where that fails, in halves, so that it fails for few."""
        try:
            return advance(model, sleep, rows, most=most)
        except Exception as error:  # whatever a model raises ends these requests, not the server
            short = is_out_of_memory(error)
            if len(rows) == 1:
                LOG.error("the model failed on a request", exc_info=error)
            # The frames that it came through hold what was computed.
            failed = error.with_traceback(None)
        if short:
            self._lower(model, max(len(rows) // 2, 1))
        if len(rows) == 1:
            return [replace(rows[0], error=failed)]
        half = len(rows) // 2
        first = self._advance(model, sleep, rows[:half], most)
        return first + self._advance(model, sleep, rows[half:], most)

    def _lower(self, model: Backbone, fitting: int) -> None:
        """Let fewer rows into a step from now on."""
        LOG.warning("out of memory: from now on %d rows at a time", fitting)
        if model is self.model:
            self.most_rows = min(self.most_rows, fitting)
        else:
            self.most_sleepers = min(self.most_sleepers, fitting)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _guarded(self, loop: Callable[[], None]) -> None:
        """Run one of the two loops; if it fails, which it must not, nobody waits for what never comes."""
        try:
            loop()
        except BaseException as error:
            LOG.critical("the engine has ended", exc_info=error)
            failed = RuntimeError("the engine has ended")
            with self._changed:
                self._closing = self.failed = True
                ended = [*self._active, *self._due, *self._asleep]
                for place in (self._active, self._due, self._asleep):
                    place.clear()
                self._changed.notify_all()
            for request in ended:
                request.tell(Happened(what="done", row=replace(request.row, error=failed)))

    def _after(self, request: Request, row: Row, place: deque[Request] | list[Request]) -> None:
        """Put a request where it belongs after a step, and tell what happened."""
        before = request.row
        with self._changed:
            if request not in place:  # the engine has ended
                return
            place.remove(request)
            request.stepping = False
            if request.left:
                row = _ended(row)
            request.row = row
            due = not row.done and self._is_due(row)
            if not row.done:
                (self._due if due else self._active).append(request)
            wrote, slept = row.answer is not before.answer, row.stream.sleeps - before.stream.sleeps
            self.counts.tokens_read += max(row.stream.tokens - before.stream.tokens, 0)
            self.counts.tokens_written += wrote
            self.counts.sleeps += max(slept, 0)
            self.counts.broken += row.error is not None
            # Told with the lock held: the other thread may not be further before it was said how far this is.
            what: What = "wrote" if wrote else "slept" if slept > 0 else "read"
            if not request.left:  # a row that was ended has no token that it could tell of
                request.tell(Happened(what=what, row=row, pieces=row.pieces, odds=row.odds))
            if row.done:
                request.tell(Happened(what="done", row=row))
            elif due:
                request.tell(Happened(what="sleeping", row=row))
            self._changed.notify_all()

    def _is_due(self, row: Row) -> bool:
        """Say whether a row goes on with a sleep."""
        if row.done or self.sleep.window is None:
            return bool(row.nap) and not row.done
        if row.nap and not row.budget:
            return row.turn(self.sleep).passes > 0
        answers = bool(row.answer.tokens or row.answer.stopped)
        # Where nobody waits for an answer (a text that goes into a memory) nothing is gained by being late.
        asks = self.debt_of == "turn" and row.budget > 0
        debt = self.debt if answers or asks else 0
        return len(row.stream.window) + len(row.unread) > self.sleep.window + debt


def settled(row: Row, sleep: SleepConfig) -> Row | None:
    """Return a row that pays the debt of one that is done, or None if it has none."""
    window = row.stream.window
    if sleep.window is None or len(window) <= sleep.window:
        return None
    return Row(stream=row.stream.reopened(), unread=window)


def _ended(row: Row) -> Row:
    """Return a row that is done, wherever it is."""
    return replace(row, budget=0, unread=row.unread[:0], nap=0)


def _writes(row: Row) -> bool:
    """Say whether somebody waits for what this row writes: at most the token drawn last is unread."""
    return len(row.unread) <= 1 and not row.nap and bool(row.budget or row.answer.tokens)
