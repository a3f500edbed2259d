"""A server that ends in order: what is under way is answered, what comes is told to go elsewhere."""

import asyncio
import os
import signal
import socket
import time
from types import FrameType

import uvicorn

from lmsleep.serve.context import Context

PATIENCE = 60.0  # seconds that answers under way may take after a signal


class Draining(uvicorn.Server):
    """Goes on listening after a first SIGINT or SIGTERM until all answers are out; a second ends it at once.

    Meanwhile new requests are answered by 503 and /ready says so, and what is read in the background pauses.
    """

    def __init__(self, config: uvicorn.Config, here: Context) -> None:
        super().__init__(config)
        self.here = here
        self._since: float | None = None
        self._pausing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and only then say so."""
        await super().startup(sockets)
        if self.started:
            self.here.started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; called by a signal."""
        self.here.ready = False
        self._since = time.monotonic()
        # All that was answered is on disk, as after a kill.
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, lambda number, _: os._exit(128 + number))

    async def on_tick(self, counter: int) -> bool:
        """Say whether it is time to end; called ten times a second."""
        if self._since is not None:
            if self._pausing is None:
                self._pausing = asyncio.create_task(self.here.reader.pause())
            under_way = self.server_state.tasks or self.here.running or not self._pausing.done()
            late = time.monotonic() - self._since > PATIENCE
            self.should_exit = late or (not under_way and self.here.service.idle)
        return await super().on_tick(counter)
