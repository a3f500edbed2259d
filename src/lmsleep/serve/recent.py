"""States in memory: those that were used last, within a budget of bytes."""

import threading
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What is held."""

    @property
    def nbytes(self) -> int:
        """Count its bytes."""
        ...


T = TypeVar("T", bound=Sized)


class Recent(Generic[T]):
    """Holds values by name; whoever was not used longest leaves first. For any threads.

    Args:
        most_bytes: of all values together; one is always held.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.nbytes, self.evicted = most_bytes, 0, 0
        self._held = OrderedDict[str, T]()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Count the values."""
        return len(self._held)

    def get(self, name: str) -> T | None:
        """Return a value, which is then the one that was used last."""
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
            return self._held.get(name)

    def put(self, name: str, value: T) -> None:
        """Hold a value, and let go of others where there is no room."""
        with self._lock:
            self._drop(name)
            self._held[name] = value
            self.nbytes += value.nbytes
            while self.nbytes > self.most_bytes and len(self._held) > 1:
                self._drop(next(iter(self._held)))
                self.evicted += 1

    def drop(self, name: str) -> None:
        """Let go of a value, if it is held."""
        with self._lock:
            self._drop(name)

    def _drop(self, name: str) -> None:
        if (old := self._held.pop(name, None)) is not None:
            self.nbytes -= old.nbytes
