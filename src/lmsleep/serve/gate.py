"""What every request goes through: it gets an id, bounds of size and time, and a line in the log."""

import asyncio
import re
import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmsleep.serve.errors import ApiError, failed
from lmsleep.serve.log import FIELDS, LOG

MIB = 2**20
ID = "x-request-id"
SANE = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # an id that a client may give: no blanks, nothing to escape
SHOWN = 200  # characters of a path in the log


@dataclass
class Asked:
    """What is known of a request while it is answered.

    Attributes:
        id: in the answer's headers and in the log.
        most_bytes: that its body may have.
        owner: whose it is, once that is known.
        read: tokens that had to be read for it.
        written: tokens that were written for it.
    """

    id: str
    most_bytes: int
    owner: str | None = None
    read: int = 0
    written: int = 0


class NotTaken(Exception):
    """A client has stopped to take its answer."""


_asked: ContextVar[Asked] = ContextVar("asked")


def asked() -> Asked:
    """Return the request that is being answered, also in tasks that it has begun."""
    return _asked.get()


class Gate:
    """An ASGI application around another one.

    Args:
        app: what answers.
        most_bytes: that a body may have, unless the endpoint says otherwise (`Asked.most_bytes`).
        patience: seconds that a client may take to send the next part of a body, or to take one of an answer.
    """

    def __init__(self, app: ASGIApp, *, most_bytes: int = 16 * MIB, patience: float = 60.0) -> None:
        self.app, self.most_bytes, self.patience = app, most_bytes, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(ID, "")
        one = Asked(given if SANE.fullmatch(given) else f"req_{secrets.token_hex(12)}", self.most_bytes)
        _asked.set(one)
        began, status = time.perf_counter(), 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[ID] = one.id
            try:
                async with asyncio.timeout(self.patience):
                    await send(message)
            except TimeoutError:
                raise NotTaken from None

        try:
            await self.app(scope, self._bounded(scope, receive, one), stamped)
        except NotTaken:  # returning cuts the connection
            LOG.warning("a client did not take its answer", extra={FIELDS: {"request": one.id}})
        except Exception:
            LOG.exception("a request failed", extra={FIELDS: {"request": one.id}})
            if not status:
                await failed().answer()(scope, receive, stamped)
        finally:
            fields = {
                "request": one.id, "owner": one.owner, "method": scope["method"],
                "path": scope["path"][:SHOWN], "status": status,
                "seconds": round(time.perf_counter() - began, 6), "read": one.read, "written": one.written,
            }  # fmt: skip
            LOG.info("request", extra={FIELDS: fields})

    def _bounded(self, scope: Scope, receive: Receive, one: Asked) -> Receive:
        """Return a `receive` that refuses a body which is too long or comes too slowly."""
        length, count, whole = Headers(scope=scope).get("content-length", ""), 0, False

        async def bounded() -> Message:
            nonlocal count, whole
            if whole:  # what is waited for is the client's leaving
                return await receive()
            if length.isdecimal() and int(length) > one.most_bytes:
                raise _too_large(one)
            try:
                async with asyncio.timeout(self.patience):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the body of the request did not arrive", code="timeout") from None
            count += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if count > one.most_bytes:
                raise _too_large(one)
            return message

        return bounded


def _too_large(one: Asked) -> ApiError:
    return ApiError(413, f"a body of more than {one.most_bytes} bytes is not taken", code="too_large")
