"""`lmsleep serve`: sessions that sleep, behind the API that clients of OpenAI speak."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lmsleep import shipped
from lmsleep.cli.opening import SleepOptions, new_session
from lmsleep.cli.options import parse
from lmsleep.serve.loopback import is_loopback


@dataclass(frozen=True, kw_only=True)
class ServeOptions(SleepOptions):
    """Serve a model: chat, responses and memories that sleep, for any client of the OpenAI API."""

    model: Positional[Path] = Path("depo-N4")
    """A run, saved model, Hugging Face folder, adapter, GGUF file, or a shipped model: depo-N1, depo-N4."""
    host: str = "127.0.0.1"
    """Address to listen at; any but this machine's own asks for --keys."""
    port: int = 8000
    """Port to listen at; 0: any that is free."""
    store: Path = Path("lmsleep-store")
    """Folder in which streams, responses and memories outlive the server."""
    shared: str | None = None
    """Where several servers keep them together, any address of fsspec (file:///mnt/lmsleep, s3://...): each
    key is held by the server that it asked last. The store is then a copy."""
    ray: int | None = None
    """Replicas under Ray Serve (extra ray), which share --shared: a key stays with the one that holds it."""
    keys: Path | None = None
    """File of keys, a line each: NAME KEY. Every name is a namespace of its own."""
    alias: tuple[str, ...] = ()
    """Further names of the model, for clients that insist on one (gpt-4o)."""
    max_tokens: int = 1024
    """Longest answer where a request does not say."""
    debt: int | None = None
    """Tokens that an answer may run past the end of its window before a sleep must come; 0: it comes at once;
    default L / 4."""
    debt_of: Literal["answer", "turn"] = "answer"
    """turn: a question may run into debt as well and never waits for a sleep, but what it asks about may not
    have been slept on."""
    sleep_after: float = 0.0
    """With --debt-of turn: seconds that a stream rests in debt before it sleeps; who goes on sooner has all
    of it in sight."""
    portion: int = 32
    """Most tokens of prompts that a step reads while somebody waits for a next token."""
    max_waiting: int = 1024
    """Requests at a time; more are told to come back."""
    max_rows: int = 64
    """Rows in one step."""
    memory_bytes: int = 2**30
    """Bytes of states that are held in memory; all are on disk."""
    disk_bytes: int | None = None
    """Bytes of the store. What was used longest ago leaves: first what saves plain chats the reading, then
    responses; memories and conversations stay. Default without limit."""
    keep_days: float | None = 30
    """Days that a response can be gone on from after it was last used; None: for ever."""
    requests_a_minute: int | None = None
    """Of each owner, those that ask or make something (POST); default without limit."""
    tokens_a_minute: int | None = None
    """Of each owner, read and written; default without limit."""
    max_memories: int | None = None
    """Of each owner; default without limit."""
    max_bytes: int | None = None
    """On disk, of each owner; default without limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must lie in 0 ... 65535, got {self.port}")
        for name in ("max_tokens", "portion", "max_waiting", "max_rows", "memory_bytes", "disk_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.keep_days is not None and not self.keep_days > 0:
            raise ValueError(f"keep_days must be positive, got {self.keep_days}")
        if self.debt is not None and self.debt < 0:
            raise ValueError(f"debt must not be negative, got {self.debt}")
        if not 0 <= self.sleep_after < float("inf"):
            raise ValueError(f"sleep_after must be finite and not negative, got {self.sleep_after}")
        if self.sleep_after and self.debt_of == "answer":
            raise ValueError(
                f"sleep_after={self.sleep_after} is of no use where the next question sleeps first: name "
                "--debt-of turn"
            )
        if self.ray is not None and self.ray < 1:
            raise ValueError(f"ray must be at least 1 replica, got {self.ray}")
        if self.ray is not None and self.keys is None:
            raise ValueError(f"ray={self.ray} replicas know by its key who holds a session: name --keys")
        if self.ray is not None and self.shared is None:
            raise ValueError(
                f"ray={self.ray} replicas need a place where all find what one kept: name --shared"
            )
        if self.keys is None and not is_loopback(self.host):
            raise ValueError(
                f"host={self.host} can be reached from elsewhere: name the --keys of those who may"
            )


def serve(argv: list[str]) -> None:
    """Run `lmsleep serve MODEL`."""
    options = parse(ServeOptions, argv, "lmsleep serve")
    extra = "serve" if options.ray is None else "ray"
    try:
        from lmsleep.serve import run
        from lmsleep.serve.keys import Keys, Quota

        if options.ray is not None:
            from lmsleep.serve import replicas
            from lmsleep.training.device import choose_device
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}: pip install 'lmsleep[{extra}]'") from None

    quota = Quota(
        requests_a_minute=options.requests_a_minute,
        tokens_a_minute=options.tokens_a_minute,
        memories=options.max_memories,
        bytes=options.max_bytes,
    )
    path = shipped.find(options.model)
    name = path.resolve().name
    examples = (shipped.EXAMPLE,) if path.parent == shipped.HERE and path.name in shipped.runs() else ()
    how = run.Settings(
        names=(name, *options.alias),
        examples=examples,
        keys=Keys(options.keys, quota),
        store=options.store.absolute(),
        shared=options.shared,
        longest=options.max_tokens,
        debt=options.debt,
        debt_of=options.debt_of,
        sleep_after=options.sleep_after,
        portion=options.portion,
        most_waiting=options.max_waiting,
        most_rows=options.max_rows,
        most_bytes=options.memory_bytes,
        most_disk=options.disk_bytes,
        keep_days=options.keep_days,
    )
    opened = partial(new_session, path.absolute(), options)

    def tell(url: str) -> None:
        _tell(url, name, examples)

    if options.ray is None:
        run.run(opened(), how, options.host, options.port, tell)
    else:
        gpus = int(choose_device(options.device).type == "cuda")
        replicas.run(opened, how, options.ray, options.host, options.port, tell, gpus)


def _tell(url: str, name: str, examples: tuple[str, ...]) -> None:
    """Say where the server is, and what to try."""
    lines = [
        f"lmsleep serves {name} at {url}",
        f"  a page to talk to it:  {url}/",
        *(f"  where one may say:     {example}" for example in examples),
        f"  its API:               {url}/openapi.json",
        f'  with any client:       OpenAI(base_url="{url}/v1", api_key="...")',
        "Ctrl-C ends it; what was answered is kept.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
