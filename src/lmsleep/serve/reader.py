"""Texts that are read in the background, and taken up again after a restart."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lmsleep.serve.errors import ApiError
from lmsleep.serve.keys import Owner
from lmsleep.serve.service import Service, Written
from lmsleep.session import Row

KEEP_EVERY = 5.0  # seconds


class Reader:
    """Reads texts into memories, each by a task of its own.

    What is still to be read is in the store before a request is answered: a kill loses nothing but time.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._tasks = dict[str, asyncio.Task[None]]()
        self._progress = dict[str, dict[str, Any]]()
        self._held = set[str]()

    async def read(self, who: Owner, id: str, tokens: Tensor) -> None:
        """Begin to read tokens into a memory."""
        await asyncio.to_thread(self.service.store.put_unread, who.name, id, tokens)
        self._begin(who.name, id, tokens)

    def take_up(self) -> None:
        """Go on with what was being read when the server stopped."""
        for owner, id, tokens in self.service.store.all_unread():
            self._begin(owner, id, tokens)

    def busy(self, id: str) -> bool:
        """Say whether something changes this memory just now."""
        return id in self._tasks or id in self._held

    @contextmanager
    def held(self, id: str) -> Iterator[None]:
        """Keep others from changing a memory."""
        if self.busy(id):
            raise ApiError(409, f"memory {id!r} is being changed", code="busy")
        self._held.add(id)
        try:
            yield
        finally:
            self._held.discard(id)

    def progress(self, id: str) -> dict[str, Any] | None:
        """Say how far reading is, or None if nothing is being read."""
        return self._progress.get(id)

    async def stop(self, id: str) -> None:
        """Stop reading into a memory, for good."""
        if (task := self._tasks.get(id)) is not None:
            task.cancel()
            await asyncio.wait([task])
        await asyncio.to_thread(self.service.store.drop_unread, id)

    async def pause(self) -> None:
        """Stop all reading; it is taken up with the next start."""
        for task in list(self._tasks.values()):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    def _begin(self, owner: str, id: str, tokens: Tensor) -> None:
        self._progress[id] = {"read": 0, "total": len(tokens), "tokens_a_second": None}
        task = asyncio.create_task(self._read(owner, id, tokens))
        self._tasks[id] = task
        task.add_done_callback(lambda _: self._over(id))

    def _over(self, id: str) -> None:
        self._tasks.pop(id, None)
        self._progress.pop(id, None)

    async def _read(self, owner: str, id: str, tokens: Tensor) -> None:
        store = self.service.store
        thing = store.get(owner, "memory", id)
        kept = None if thing is None or thing.stream is None else await self.service.find(owner, thing.stream)
        if thing is None or kept is None:
            return
        began, offset = time.monotonic(), 0
        saved = began
        try:
            async for event in self.service.follow(
                Row(stream=kept.stream, unread=torch.cat([kept.unread, tokens]))
            ):
                now, done = time.monotonic(), event.what == "done"
                # Negative while the window that was open is read once more.
                count = event.row.stream.tokens - kept.stream.tokens - len(kept.unread)
                read = offset + max(count, 0)
                speed = read / (now - began) if now > began else None
                self._progress[id] = {"read": read, "total": len(tokens), "tokens_a_second": speed}
                if done or (count > 0 and event.what == "slept" and now - saved > KEEP_EVERY):
                    new = tokens[offset : offset + count]
                    kept = await self.service.keep(owner, Written(kept, new, 0, row=event.row))
                    offset, saved = offset + count, now
                    await asyncio.to_thread(store.progress, owner, id, kept.id, tokens[offset:])
        except ApiError as error:
            said = {**thing.body, "status": "failed", "error": error.body["message"]}
            await asyncio.to_thread(store.fail, owner, id, said)
