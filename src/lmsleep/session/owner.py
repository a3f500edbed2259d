"""Own rows: let them go on step by step, keep where they are, and what they were before."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import RLock
from typing import Any

from torch import Tensor

from lmsleep.session.rows import Row, advance, raise_first
from lmsleep.session.stream import Stream
from lmsleep.sleep import Backbone, SleepConfig


class Owner:
    """A stream that goes on call by call, the last `history` of which can be taken back.

    It takes one call at a time: a call from another thread meanwhile is refused and changes nothing.

    Args:
        model: any `Backbone`.
        sleep: how it sleeps.
        begin: where the stream begins.
        history: how many calls can be taken back.

    Raises:
        ValueError: for a negative history.
    """

    def __init__(self, model: Backbone, sleep: SleepConfig, begin: Stream, history: int) -> None:
        if history < 0:
            raise ValueError(f"history must not be negative, got {history}")
        self.model, self.sleep_config, self.stream, self.history = model, sleep, begin, history
        self.seconds_awake = self.seconds_asleep = 0.0
        # Streams are values, so the past needs no copies; the oldest one falls out by itself.
        self.past = deque[Stream](maxlen=history)
        self._used = RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: all but the lock, for nobody uses the copy."""
        return {name: value for name, value in vars(self).items() if name != "_used"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Invert `__getstate__`."""
        vars(self).update(state, _used=RLock())

    def rewind(self) -> None:
        """Take back the last call of `read`, `sleep` or `generate`, bit for bit: as if it had not been made.

        That holds for what broke off too (a `BrokenSleep`, an interrupt, an answer that nobody read to its
        end). Calls that changed nothing do not count. Times that were spent stay spent. The past is held in
        memory only: `save` writes none of it, a loaded session begins without, a fork shares it.

        Raises:
            ValueError: if there is nothing to take back, or no longer (`history`).
            RuntimeError: if another thread uses the session.
        """
        with using([self]):
            if not self.past:
                raise ValueError(
                    "there is nothing to take back: the session has just begun, or was loaded, or history="
                    f"{self.history} keeps no more"
                )
            self.stream = self.past.pop()

    @property
    def history_bytes(self) -> int:
        """Count the bytes that are held to take calls back, and for nothing else."""
        now = {id(t) for t in _tensors(self.stream)}  # streams of one window share where it began
        # By identity: streams of the past share tensors with each other too, and each counts once.
        held = {id(t): t.nbytes for stream in tuple(self.past) for t in _tensors(stream)}
        return sum(size for name, size in held.items() if name not in now)


@contextmanager
def using(owners: Sequence[Owner]) -> Iterator[None]:
    """Keep other threads from changing owners; this one may use them on.

    Raises:
        RuntimeError: if another thread uses one of them.
    """
    with ExitStack() as held:
        for owner in owners:
            # Not waited for: whose call comes first would be chance, and each goes on from what it finds.
            if not owner._used.acquire(blocking=False):
                raise RuntimeError(
                    "the session is used by another thread, and takes one call at a time; fork() it, or let "
                    "one thread wait for the other"
                )
            held.callback(owner._used.release)
        yield


def proceed(owners: Sequence[Owner], rows: Sequence[Row]) -> Generator[list[Row], None, None]:
    """Advance one row of each owner until all are done, and let the owners go along, step by step.

    With the first step each owner keeps what it was, for `rewind`. Where the caller leaves early, what was
    shown is read all the same.

    Yields:
        The rows after each step.

    Raises:
        BrokenSleep: in the end, if a sleep of some row left NaN or infinity; what else broke a row as it is.
        RuntimeError: if something else has changed an owner since the last step, or is about to.
    """
    rows, began = list(rows), False
    while not all(row.done for row in rows):
        before, rows = rows, _step(owners, rows)
        # After the step: one that raises, or a call without any, leaves nothing to take back.
        if not began:
            for owner, row in zip(owners, before, strict=True):
                owner.past.append(row.stream)
            began = True
        try:
            yield rows
        except GeneratorExit:
            # The last token was shown but is still unread, and a full window sleeps before it. If somebody
            # else has gone on with the stream since, theirs is kept.
            rows = [replace(row, budget=0) for row in rows]
            while not all(row.done for row in rows) and not _astray(owners, rows):
                rows = _step(owners, rows)
            raise_first(rows)
            raise
    raise_first(rows)


def finish(owners: Sequence[Owner], rows: Sequence[Row]) -> list[Row]:
    """Return the rows after `proceed` brought them to their end; its errors are raised here."""
    # The last of the steps, or the rows themselves where there is none to take.
    last = deque([[*rows]], maxlen=1)
    with using(owners):  # over all steps: who comes between is refused, not this call in its middle
        last.extend(proceed(owners, rows))
    return last[0]


def _step(owners: Sequence[Owner], rows: Sequence[Row]) -> list[Row]:
    with using(owners):
        if _astray(owners, rows):
            raise RuntimeError(
                "the session was changed since this call began; give each stream of answers a fork() of it"
            )
        after = advance(owners[0].model, owners[0].sleep_config, rows)
        for owner, before, now in zip(owners, rows, after, strict=True):
            owner.stream = now.stream
            # Differences: a row counts its own time, from zero or from where it was handed over.
            owner.seconds_awake += now.seconds_awake - before.seconds_awake
            owner.seconds_asleep += now.seconds_asleep - before.seconds_asleep
    return after


def _astray(owners: Sequence[Owner], rows: Sequence[Row]) -> bool:
    """Say whether some owner does not stand where its row does."""
    # Every change makes a new stream, so the identity of the object is enough.
    return any(owner.stream is not row.stream for owner, row in zip(owners, rows, strict=True))


def _tensors(stream: Stream) -> Iterator[Tensor]:
    yield stream.window
    for state in (stream.start, stream.state):
        yield from state.tensors()
