"""Clients that leave, and tasks that nobody waits for any more: what was begun ends."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lmsleep.serve.errors import ApiError

LOOK_EVERY = 0.25  # seconds
T = TypeVar("T")


async def end(tasks: Iterable["asyncio.Task[None]"]) -> None:
    """Cancel tasks, and wait until they have ended."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    if ending:
        await asyncio.wait(ending)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` does, which is cancelled once the client has left.

    Raises:
        ApiError: 499 if it has; nobody reads it.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has left", code="client_closed_request")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Wait until the client has left."""
    while not await request.is_disconnected():
        await asyncio.sleep(LOOK_EVERY)


class Events(StreamingResponse):
    """Events as they are sent; what makes them ends with the connection."""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        no_buffer = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=no_buffer)
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.events.aclose()
