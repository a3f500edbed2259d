"""Run the server until a signal ends it."""

import hashlib
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn

from lmsleep.serve.app import create_app
from lmsleep.serve.context import Context
from lmsleep.serve.drain import Draining
from lmsleep.serve.engine import Engine
from lmsleep.serve.keys import Keys
from lmsleep.serve.log import to_stderr
from lmsleep.serve.metrics import Metrics
from lmsleep.serve.service import Service
from lmsleep.serve.store import Store
from lmsleep.session import Session
from lmsleep.text.chat import chat_of


def run(
    session: Session,
    *,
    names: tuple[str, ...],
    examples: tuple[str, ...],
    host: str,
    port: int,
    store: Path,
    keys: Keys,
    longest: int,
    debt: int,
    sleep_after: float,
    portion: int,
    most_waiting: int,
    most_rows: int,
    most_bytes: int,
    most_disk: int | None,
    keep_days: float | None,
    tell: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM; answers under way are brought to their end first.

    `session` has read nothing: its model, sleep and tokenizer are what is served. `tell` is called with the
    address once it can be reached.

    Raises:
        ValueError: for a store that is in use, or of another model.
        OSError: if the address is taken, or the store cannot be written.
    """
    assert session.tokenizer is not None
    to_stderr()
    listening = _listen(host, port)
    _allow_connections()
    model, sleep = session.model, session.sleep_config
    engine = Engine(model, sleep, portion=portion, debt=debt, most_waiting=most_waiting, most_rows=most_rows)
    try:
        kept = Store(
            store,
            model,
            sleep,
            most_bytes=most_bytes,
            most_disk=most_disk,
            most_each=keys.quota.bytes,
            keep_days=keep_days,
        )
    except BaseException:
        listening.close()
        raise
    service = Service(
        engine,
        kept,
        session.tokenizer,
        chat_of(session.tokenizer),
        name=names[0],
        longest=longest,
        sleep_after=sleep_after,
    )
    said = f"{kept.origin.model} {json.dumps(sleep.to_dict())}"
    fingerprint = f"fp_{hashlib.sha256(said.encode()).hexdigest()[:16]}"
    here = Context(service, keys, Metrics(engine, kept, names[0]), names, fingerprint, examples)
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


def _listen(host: str, port: int) -> socket.socket:
    """Take the address before anything is loaded that would have been loaded in vain."""
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
