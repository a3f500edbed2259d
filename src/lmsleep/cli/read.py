"""`lmsleep read`: files into a memory, resumable."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lmsleep.cli.opening import SleepOptions, opened, status, take_up
from lmsleep.cli.options import parse
from lmsleep.files import locked
from lmsleep.opening import Opened
from lmsleep.session import Session, read_files


@dataclass(frozen=True, kw_only=True)
class ReadOptions(SleepOptions):
    """Read files, one after the other, into a memory: new, or what the memory file holds already.

    After a kill, the same command goes on and ends with exactly the memory of an uninterrupted reading.
    Files that the memory has just read are not read twice.
    """

    model: Positional[Path]
    """A run, saved model, Hugging Face folder, adapter, GGUF file, or a shipped model: depo-N1, depo-N4."""
    files: Positional[tuple[Path, ...]]
    """Files to read: text, or a task's own words (n3 n1 ...)."""
    memory: Path
    """Memory file to write."""
    parent: Path | None = None
    """Memory to fork a new one from."""
    sleep_at_end: bool = False
    """Sleep on the open window at the end, as on the context of a task before its questions."""
    tag: tuple[str, ...] = ()
    """KEY=VALUE to remember in the file."""
    save_every: float = 30.0
    """Seconds between saves."""


def read(argv: list[str]) -> None:
    """Run `lmsleep read MODEL FILE... --memory MEMORY`."""
    options = parse(ReadOptions, argv, "lmsleep read")
    # Before the model is loaded, so that a mistyped tag costs no time.
    tags = dict(_tag(tag) for tag in options.tag)
    began = options.memory if options.memory.exists() else options.parent
    on = opened(options.model, options, memory=began)
    # From before the file is read until the last save: of two readings into it one would be lost.
    with locked(options.memory):
        session = _begin(options, on)
        read_files(
            session,
            options.files,
            save=options.memory,
            save_every=options.save_every,
            tags=tags,
            progress=True,
        )
        if options.sleep_at_end:
            session.sleep()
            session.save(options.memory)
    sys.stdout.write(f"{options.memory}: {status(session)}\n")


def _tag(text: str) -> tuple[str, str]:
    """Split KEY=VALUE; raises ValueError for anything else."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"tag must be KEY=VALUE, got {text!r}")
    return key, value


def _begin(options: ReadOptions, on: Opened) -> Session:
    """Return the session that reads: what the memory file holds, a fork of the parent, or a new one."""
    # The file goes before --parent: after a kill the same command, which names both, must go on.
    if options.memory.exists():
        session = take_up(options.memory, on, options)
        if options.parent is not None and take_up(options.parent, on, options).origin.id not in (
            session.origin.parents
        ):
            raise ValueError(f"--parent {options.parent}: {options.memory} exists and is no fork of it")
        return session
    return Session(*on, history=0) if options.parent is None else take_up(options.parent, on, options).fork()
