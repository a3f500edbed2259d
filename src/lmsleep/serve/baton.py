"""One model, two threads, one at a time: who answers goes before who sleeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any

from torch import Tensor

from lmsleep.sleep import Backbone
from lmsleep.state import State


class Baton:
    """Is held by the thread that uses the model.

    The thread that answers takes it as soon as the other one offers it (`offer`), which it does between any
    two blocks: an answer waits for one block of a sleep at most.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._held = False
        self._answering = 0  # threads that wait to answer

    @contextmanager
    def to_answer(self) -> Iterator[None]:
        """Hold the baton, before anybody who waits to sleep."""
        with self._changed:
            self._answering += 1
            self._changed.wait_for(lambda: not self._held)
            self._answering -= 1
            self._held = True
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def to_sleep(self) -> Iterator[None]:
        """Hold the baton when nobody answers or waits to."""
        self._acquire_last()
        try:
            yield
        finally:
            self._release()

    def offer(self) -> None:
        """Let whoever waits to answer go first; called while the baton is held to sleep."""
        # Read without the lock: a number that is just being changed is seen at the next block.
        if self._answering:
            self._release()
            self._acquire_last()

    def _acquire_last(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._held and not self._answering)
            self._held = True

    def _release(self) -> None:
        with self._changed:
            self._held = False
            self._changed.notify_all()


class GivingWay:
    """A `Backbone` that offers the baton before every block; what it computes is what the model computes."""

    def __init__(self, model: Backbone, baton: Baton) -> None:
        self.model, self.baton = model, baton

    def __getattr__(self, name: str) -> Any:
        """Return what the model has."""
        return getattr(self.model, name)

    def run(self, h: Tensor, state: State, start: int, stop: int, **how: Any) -> tuple[Tensor, State]:
        """Run blocks `start ... stop - 1`, one by one; see `Backbone.run`."""
        for block in range(start, stop):
            self.baton.offer()
            h, state = self.model.run(h, state, block, block + 1, **how)
        return h, state
