"""MODEL on the command line, with options of a new session."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from lmsleep.opening import open_model
from lmsleep.session import Session

GIVEN = ("window", "passes", "loop")  # options that a session which is taken up may not contradict


@dataclass(frozen=True, kw_only=True)
class SleepOptions:
    """Options of a new session; one that is taken up keeps its own."""

    window: int | None = None
    """L of a new session; default that of the run or folder, or 64 (512 for a Hugging Face model)."""
    passes: int | None = None
    """N of a new session; default that of the run or folder, or 4."""
    loop: tuple[int, int] | Literal["middle"] | None = None
    """Blocks first ... last - 1 that a new session loops, or the middle half; default that of the run or
    folder, or all (the middle half of a Hugging Face model)."""
    tokenizer: str | None = None
    """Of a saved model: bytes, or the folder of a Hugging Face tokenizer; default its own, or bytes. A run
    has its own."""
    device: str = "auto"
    """auto (CUDA where present), cpu, cuda, ..."""
    trust: bool = False
    """Run the Python files that the run or model names, though you have trained no run with them."""


def new_session(path: Path, options: SleepOptions, *, history: int = 0) -> Session:
    """Make a session that has read nothing, for the MODEL at `path` or shipped under that name.

    `history` calls can be taken back; a command has no use for it unless it offers to.

    Raises:
        ValueError: as `open_model`, or for a sleep that does not fit the model.
        FileNotFoundError: if there is none.
    """
    model, sleep, tokenizer = open_model(path, options.tokenizer, options.device, trust=options.trust)
    given = {name: getattr(options, name) for name in GIVEN}
    # What is not given stays as the model has it.
    given = {name: value for name, value in given.items() if value is not None}
    return Session(model, replace(sleep, **given), tokenizer, history=history)


def take_up(path: Path, new: Session, options: SleepOptions) -> Session:
    """Take up the session or memory in a file, on the model of `new`.

    Raises:
        ValueError: as `Session.load`, or for options that contradict the file.
        OSError: if there is no such file.
    """
    # A file knows how it was read; options may repeat it, and must not contradict it.
    # The sleep of `new` serves a file that does not say how it was read.
    session = Session.load(path, new.model, new.tokenizer, sleep=new.sleep_config, history=new.history)
    read_with = {"window": session.sleep_config.window, **asdict(session.sleep_config.consolidator)}
    for name in GIVEN:
        wanted, has = getattr(options, name), read_with.get(name)
        if wanted not in (None, has):
            raise ValueError(f"{name}={wanted} contradicts {path}, which was read with {name}={has}")
    return session


def status(session: Session) -> str:
    """Return one line: window fill, tokens, sleeps, bytes."""
    s, window = session.stats, session.sleep_config.window
    return (
        f"window {s.window_tokens}/{window or '-'} · {s.tokens:,} tokens · {s.sleeps:,} sleeps · "
        f"working {s.working_bytes:,} B · fast weights {s.memory_bytes:,} B"
    )
