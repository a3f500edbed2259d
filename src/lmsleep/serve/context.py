"""What every endpoint has at hand: the service, who asks, and what is counted."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request

from lmsleep.serve.errors import ApiError, draining, not_found
from lmsleep.serve.gate import asked
from lmsleep.serve.keys import Keys, Owner
from lmsleep.serve.loopback import is_loopback
from lmsleep.serve.metrics import Metrics
from lmsleep.serve.reader import Reader
from lmsleep.serve.service import Event, Service, Wanted, Written
from lmsleep.serve.store import Thing
from lmsleep.serve.wire import Body


@dataclass(eq=False)
class Context:
    """The server as endpoints see it.

    Attributes:
        service: reads and writes.
        keys: knows who asks.
        metrics: counts.
        names: that the model answers to.
        fingerprint: of model and sleep: equal ones give equal answers to equal seeds.
        examples: of what can be said to the model, for people who do not know it.
        ready: whether new work is taken.
        running: responses that are made in the background.
        most_bytes: of the body of a request that is no JSON.
        started: is called once requests can be answered.
        reader: reads texts into memories.
    """

    service: Service
    keys: Keys
    metrics: Metrics
    names: tuple[str, ...]
    fingerprint: str
    examples: tuple[str, ...] = ()
    ready: bool = True
    running: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)
    most_bytes: int = 256 * 2**20
    started: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.reader = Reader(self.service)
        self._held = set[tuple[str, str]]()

    @contextmanager
    def held(self, who: Owner, id: str) -> Iterator[None]:
        """Keep other requests from changing a conversation.

        Raises:
            ApiError: 409 if one does already.
        """
        # By owner, or one could learn of what another one has.
        if (key := (who.name, id)) in self._held:
            raise ApiError(409, f"conversation {id!r} is being changed", code="busy")
        self._held.add(key)
        try:
            yield
        finally:
            self._held.discard(key)

    def find(self, who: Owner, kind: str, id: str) -> Thing:
        """Return a document of this owner.

        Raises:
            ApiError: 404 if there is none.
        """
        thing = self.service.store.get(who.name, kind, id)
        if thing is None:
            raise not_found(kind, id)
        return thing

    def check(self, body: Body) -> None:
        """Refuse what this server cannot do.

        Raises:
            ApiError: naming the field.
        """
        if (most := self.service.engine.most_waiting) <= self.service.engine.waiting:
            # Before a stream has begun: then it still has a status of its own.
            raise ApiError(
                429, f"{most} requests are being answered or wait already", code="busy", retry_after=1
            )
        model = getattr(body, "model", None)
        if model is not None and model not in self.names:
            raise ApiError(
                404,
                f"there is no model {model!r}; there is {self.names[0]!r}",
                code="model_not_found",
                param="model",
            )
        body.check()

    async def body(self, request: Request) -> bytes:
        """Return the body of a request that is no JSON, of `most_bytes` at most.

        Raises:
            ApiError: 413 if it is longer.
        """
        asked().most_bytes = self.most_bytes
        return await request.body()

    def spent(self, who: Owner, *, read: int = 0, written: int = 0) -> None:
        """Count tokens against the quota of an owner, and for the log."""
        self.keys.spend(who, read + written)
        asked().read += read
        asked().written += written

    async def write(self, who: Owner, written: Written, wanted: Wanted) -> AsyncGenerator[Event]:
        """Write an answer as `Service.write` does; what it took is counted however it ends."""
        try:
            async with aclosing(self.service.write(written, wanted)) as events:
                async for event in events:
                    yield event
        finally:
            self.spent(who, read=len(written.prompt), written=len(written.tokens))

    async def timed(self, events: AsyncGenerator[Event], began: float) -> AsyncGenerator[Event]:
        """Pass on what happens to an answer that was asked for at `began`; count how long a client waits."""
        last = None
        async with aclosing(events):
            async for event in events:
                if event.what == "wrote":
                    now = time.perf_counter()
                    metric = self.metrics.first_token if last is None else self.metrics.between
                    metric.observe(now - (last or began))
                    last = now
                yield event
        self.metrics.whole.observe(time.perf_counter() - began)

    def told(self, written: Written) -> None:
        """Count an answer that is complete."""
        name = self.names[0]
        self.metrics.success.labels(model_name=name, finished_reason=written.finish_reason).inc()
        self.metrics.prompt.labels(model_name=name).inc(written.prompt_tokens)
        self.metrics.known.labels(model_name=name).inc(written.known)


def context(request: Request) -> Context:
    """Return the server that a request came to."""
    found: Context = request.app.state.context
    return found


async def _who(request: Request) -> Owner:
    here = context(request)
    owner = here.keys.owner(request.headers.get("authorization"))
    asked().owner = owner.name
    if here.keys.open is not None:
        _from_here(request)
    if request.method == "POST":
        if not here.ready:
            raise draining()
        here.keys.admit(owner)
    store = here.service.store
    if store.shared is not None and await asyncio.to_thread(store.take, owner.name):
        here.reader.take_up(owner.name)
    return owner


def _from_here(request: Request) -> None:
    """Refuse, where no key protects the server, what a page from elsewhere made somebody's browser send.

    Raises:
        ApiError: 403 if the request was addressed to another name, or a page of another origin sent it.
    """
    hosts = [f"//{request.headers.get('host', '')}"]
    if (origin := request.headers.get("origin")) is not None:
        hosts.append(origin)
    for host in hosts:
        try:
            name = urlsplit(host).hostname or ""
        except ValueError:
            name = ""
        if not is_loopback(name):
            raise ApiError(
                403, "a server without keys answers to this machine's own names alone", code="foreign_host"
            )


Who = Annotated[Owner, Depends(_who)]
