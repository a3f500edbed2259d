"""Put new positions behind old ones without copying the old ones every time."""

from threading import Lock
from typing import Any

import torch
from torch import Tensor

SPARE = 32  # positions, or an eighth of those there are: what copying costs is shared by as many tokens


class _Room:
    """The storage behind a tensor, which is longer than the tensor; who comes first may use what is free."""

    def __init__(self, buffer: Tensor | None = None, used: int = 0) -> None:
        self.buffer, self._used, self._lock = buffer, used, Lock()

    def take(self, begin: int, count: int) -> Tensor | None:
        """Return the buffer if positions `begin ... begin + count - 1` were free, and are now taken."""
        with self._lock:
            if self.buffer is None or begin != self._used or begin + count > self.buffer.shape[1]:
                return None
            self._used += count
            return self.buffer

    def __reduce__(self) -> tuple[type["_Room"], tuple[()]]:
        """Give a copy or a pickle of the tensor no room: it has a storage of its own."""
        return _Room, ()

    def __deepcopy__(self, memo: Any) -> "_Room":
        return _Room()


def append(past: Tensor, new: Tensor) -> Tensor:
    """Return `past` `[B, t, ...]` and behind it `new` `[B, T, ...]`, in the dtype of `new`.

    It is `torch.cat([past, new], dim=1)`. Without gradients the result lies in a longer storage, and what is
    appended to it in turn is written there: a value stays what it is, for nobody but the first who appends to
    it writes behind its end; the second gets a copy.
    """
    past = past.to(new.dtype)
    if torch.is_grad_enabled() or not past.shape[1] or not new.shape[1]:
        return torch.cat([past, new], dim=1)
    begin, end = past.shape[1], past.shape[1] + new.shape[1]
    room: _Room | None = getattr(past, "room", None)
    buffer = None if room is None else room.take(begin, new.shape[1])
    if buffer is None:
        # Heads before time: attention goes through the positions of one head after the other.
        heads, size = past.shape[2:-1], past.shape[-1:] if past.ndim > 2 else ()
        with torch.inference_mode(False):  # whoever makes it first: its views go on into any mode
            buffer = past.new_empty(len(past), *heads, end + max(SPARE, end // 8), *size)
            buffer = buffer.movedim(1 + len(heads), 1)
        buffer[:, :begin] = past
        room = _Room(buffer, end)
    buffer.narrow(1, begin, end - begin).copy_(new)
    longer = buffer.narrow(1, 0, end)
    longer.room = room  # type: ignore[attr-defined]
    return longer
