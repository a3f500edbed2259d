"""Texts that are read in the background, and taken up again after a restart."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from lmsleep.serve.database import Unstored
from lmsleep.serve.errors import ApiError
from lmsleep.serve.keys import Owner
from lmsleep.serve.leaving import end
from lmsleep.serve.log import LOG
from lmsleep.serve.service import Service, Written
from lmsleep.serve.shared import Moved
from lmsleep.session import Row

KEEP_EVERY = 5.0  # seconds
TRY_AGAIN = 10.0  # seconds after a disk was full, or the server busy
PASSING = (429, 503)  # statuses of what the next attempt may not meet again
PATIENCE = 30.0  # seconds that a window may take when reading pauses


class Reader:
    """Reads texts into memories, each by a task of its own, as many at a time as sleep together.

    What is still to be read is in the store before a request is answered: a kill loses nothing but time.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._tasks = dict[str, asyncio.Task[None]]()
        self._progress = dict[str, dict[str, Any]]()
        self._held = set[str]()
        self._pausing = asyncio.Event()
        # The others wait here and take no place of those who want an answer.
        self._turn = asyncio.Semaphore(service.engine.most_sleepers)

    async def read(self, who: Owner, id: str, tokens: Tensor) -> None:
        """Begin to read tokens into a memory.

        Raises:
            ApiError: if they cannot be stored.
        """
        await asyncio.to_thread(self.service.store.put_unread, who.name, id, tokens)
        self._begin(who.name, id, len(tokens))

    def take_up(self, owner: str | None = None) -> None:
        """Go on with what was being read when a server stopped, for all owners or for one."""
        for whose, id, total in self.service.store.all_unread(owner):
            if id not in self._tasks:
                self._begin(whose, id, total)

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
        await end([self._tasks[id]] if id in self._tasks else [])
        await asyncio.to_thread(self.service.store.drop_unread, id)

    async def pause(self) -> None:
        """Stop all reading after the windows that are being read; it is taken up with the next start."""
        self._pausing.set()
        if tasks := list(self._tasks.values()):
            _, late = await asyncio.wait(tasks, timeout=PATIENCE)
            await end(late)

    def _begin(self, owner: str, id: str, total: int) -> None:
        self._progress[id] = {"read": 0, "total": total, "tokens_a_second": None}
        task = asyncio.create_task(self._read(owner, id))
        self._tasks[id] = task
        task.add_done_callback(lambda _: self._over(id))

    def _over(self, id: str) -> None:
        self._tasks.pop(id, None)
        self._progress.pop(id, None)

    async def _read(self, owner: str, id: str) -> None:
        """Read until all is read, or it is of no use to go on."""
        while not self._pausing.is_set():
            try:
                async with self._turn:
                    await self._go_on(owner, id)
                return
            except Moved:  # another server reads on
                return
            except ApiError as error:
                if not isinstance(error, Unstored) and error.status not in PASSING:
                    await self._give_up(owner, id, error)
                    return
                # No room, no memory, too much to do: it is still to be read, and will be.
                LOG.warning("reading into %s waits: %s", id, error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._pausing.wait(), TRY_AGAIN)
            except Exception:
                LOG.exception("reading into %s failed", id)
                await self._give_up(owner, id, ApiError(500, "the server failed on this text"))
                return

    async def _give_up(self, owner: str, id: str, error: ApiError) -> None:
        """Say in a memory why it reads no further."""
        store = self.service.store
        try:
            if (thing := store.get(owner, "memory", id)) is not None:
                said = {**thing.body, "status": "failed", "error": error.body["message"]}
                await asyncio.to_thread(store.fail, owner, id, said)
        except ApiError as other:
            LOG.error("that reading into %s failed could not be stored: %s", id, other)

    async def _go_on(self, owner: str, id: str) -> None:
        """Read from where the store stands to the end, and keep it now and then.

        Raises:
            ApiError: whatever ended it; what has been kept stays.
        """
        store = self.service.store
        if (thing := store.get(owner, "memory", id)) is None or thing.stream is None:
            return
        kept, tokens = await self.service.find(owner, thing.stream), store.unread(id)
        if kept is None or tokens is None or self._pausing.is_set():
            return
        began, offset = time.monotonic(), 0
        saved = began
        row = Row(stream=kept.stream, unread=torch.cat([kept.unread, tokens]))
        async with aclosing(self.service.follow(row)) as events:
            async for event in events:
                now, row = time.monotonic(), event.row
                over = event.what == "done" or self._pausing.is_set()
                # Negative while the window that was open is read once more.
                count = row.stream.tokens - kept.stream.tokens - len(kept.unread)
                read = offset + max(count, 0)
                speed = read / (now - began) if now > began else None
                self._progress[id] = {"read": read, "total": len(tokens), "tokens_a_second": speed}
                if count > 0 and (over or (event.what == "slept" and now - saved > KEEP_EVERY)):
                    new = tokens[offset : offset + count]
                    kept = await self.service.keep(owner, Written(kept, new, 0, row=row))
                    offset, saved = offset + count, now
                    await asyncio.to_thread(store.progress, owner, id, kept.id, tokens[offset:])
                if over:
                    return
