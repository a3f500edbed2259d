"""Put a server together, and run it until a signal ends it."""

import hashlib
import json
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from lmsleep.serve.app import create_app
from lmsleep.serve.context import Context
from lmsleep.serve.drain import Draining
from lmsleep.serve.engine import DebtOf, Engine
from lmsleep.serve.keys import Keys
from lmsleep.serve.log import to_stderr
from lmsleep.serve.metrics import Metrics
from lmsleep.serve.service import Service
from lmsleep.serve.store import Store
from lmsleep.session import Session
from lmsleep.text.chat import chat_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is served.

    Attributes:
        names: that the model answers to.
        examples: of what can be said to it.
        keys: file of keys, and what each may use; see `Keys`.
        store: folder of the store.
        shared: address of fsspec that several servers share; None: this one is alone.
        longest: tokens of an answer where a request does not say.
        debt: see `Engine`, and so `debt_of`, `portion`, `most_waiting` and `most_rows`; None: L / 4.
        sleep_after: see `Service`.
        most_bytes: see `Store`; and so `most_disk` and `keep_days`.
    """

    names: tuple[str, ...]
    examples: tuple[str, ...]
    keys: Keys
    store: Path
    shared: str | None
    longest: int
    debt: int | None
    debt_of: DebtOf
    sleep_after: float
    portion: int
    most_waiting: int
    most_rows: int
    most_bytes: int
    most_disk: int | None
    keep_days: float | None


def assemble(session: Session, how: Settings) -> Context:
    """Return a server around the model, the sleep and the tokenizer of a session that has read nothing.

    Raises:
        ValueError: for a store that is in use, or of another model.
        OSError: if the store cannot be written.
    """
    assert session.tokenizer is not None
    model, sleep = session.model, session.sleep_config
    engine = Engine(
        model,
        sleep,
        portion=how.portion,
        debt=(sleep.window or 0) // 4 if how.debt is None else how.debt,
        debt_of=how.debt_of,
        most_waiting=how.most_waiting,
        most_rows=how.most_rows,
    )
    store = Store(
        how.store,
        model,
        sleep,
        most_bytes=how.most_bytes,
        most_disk=how.most_disk,
        most_each=how.keys.quota.bytes,
        keep_days=how.keep_days,
        shared=how.shared,
    )
    name, chat = how.names[0], chat_of(session.tokenizer)
    service = Service(
        engine,
        store,
        session.tokenizer,
        chat,
        name=name,
        longest=how.longest,
        sleep_after=how.sleep_after,
    )
    said = f"{store.origin.model} {json.dumps(sleep.to_dict())}"
    fingerprint = f"fp_{hashlib.sha256(said.encode()).hexdigest()[:16]}"
    return Context(service, how.keys, Metrics(engine, store, name), how.names, fingerprint, how.examples)


def run(session: Session, how: Settings, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; answers under way are brought to their end first.

    `tell` is called with the address once it can be reached.

    Raises:
        ValueError: as `assemble`.
        OSError: as `assemble`, or if the address is taken.
    """
    to_stderr()
    listening = listen(host, port)
    _allow_connections()
    try:
        here = assemble(session, how)
    except BaseException:
        listening.close()
        raise
    config = uvicorn.Config(
        create_app(here),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    address, bound = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    here.started = lambda: tell(f"http://{shown}:{bound}")
    Draining(config, here).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Take the address before anything is loaded that would have been loaded in vain.

    Raises:
        OSError: naming both, if it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise OSError(f"host={host} and port={port} cannot be listened at: {error.strerror}") from None
    return listening


def _allow_connections() -> None:
    """Let the process open as many files, connections among them, as the system allows it."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
