"""What every endpoint has at hand: the service, who asks, and what is counted."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from lmsleep.serve.errors import ApiError, draining
from lmsleep.serve.keys import Keys, Owner
from lmsleep.serve.metrics import Metrics
from lmsleep.serve.reader import Reader
from lmsleep.serve.service import Service, Written
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
        ready: whether new work is taken.
        running: responses that are made in the background.
        most_bytes: of the body of a request.
        started: is called once requests can be answered.
        reader: reads texts into memories.
    """

    service: Service
    keys: Keys
    metrics: Metrics
    names: tuple[str, ...]
    fingerprint: str
    ready: bool = True
    running: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)
    most_bytes: int = 256 * 2**20
    started: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.reader = Reader(self.service)

    def check(self, body: Body) -> None:
        """Refuse what this server cannot do.

        Raises:
            ApiError: naming the field.
        """
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
        """Return the body of a request that is no JSON.

        Raises:
            ApiError: 413 if it is too long.
        """
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > self.most_bytes:
                raise ApiError(
                    413, f"a body of more than {self.most_bytes} bytes is not taken", code="too_large"
                )
        return bytes(data)

    def told(self, who: Owner, written: Written) -> None:
        """Count an answer that is complete."""
        name = self.names[0]
        self.metrics.success.labels(model_name=name, finished_reason=written.finish_reason).inc()
        self.metrics.prompt.labels(model_name=name).inc(written.prompt_tokens)
        self.metrics.known.labels(model_name=name).inc(written.known)
        self.keys.spend(who, len(written.prompt) + len(written.tokens))


def context(request: Request) -> Context:
    """Return the server that a request came to."""
    found: Context = request.app.state.context
    return found


def _who(request: Request) -> Owner:
    here = context(request)
    owner = here.keys.owner(request.headers.get("authorization"))
    if request.method == "POST":
        if not here.ready:
            raise draining()
        here.keys.admit(owner)
    return owner


Who = Annotated[Owner, Depends(_who)]
