"""`lmsleep read`: files into a memory, resumable."""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from lmsleep.cli.opening import SleepOptions, new_session, status, take_up
from lmsleep.cli.options import parse
from lmsleep.files import locked
from lmsleep.session import BrokenSleep, Session
from lmsleep.text.tokenizers import Bytes, Tokenizer

WINDOWS = 16  # read at a time, between looks at the clock
WITHOUT_WINDOW = 1024  # tokens, where nothing is ever evicted


@dataclass(frozen=True, kw_only=True)
class ReadOptions(SleepOptions):
    """Read files, one after the other, into a memory: new, or what the memory file holds already.

    After a kill, the same command goes on and ends with exactly the memory of an uninterrupted reading.
    Files that the memory has just read are not read twice.
    """

    model: Positional[Path]
    """Folder of a run, a saved model or a Hugging Face model, or a shipped one: depo-N1, depo-N4."""
    files: Positional[tuple[Path, ...]]
    """Files to read: text, or a task's own words (n3 n1 ...)."""
    memory: Path
    """Memory file to write."""
    parent: Path | None = None
    """Memory to fork a new one from."""
    sleep: bool = False
    """Sleep on the open window at the end, as on the context of a task before its questions."""
    tag: tuple[str, ...] = ()
    """KEY=VALUE to remember in the file."""
    save_every: float = 30.0
    """Seconds between saves."""


@dataclass(frozen=True)
class Reading:
    """Which files are read, from where on in the life of the session; kept among the tags of the memory."""

    files: list[str]
    """SHA-256 of each."""
    tokens: int
    """Tokens in all of them."""
    begin: int
    """Tokens that the session had read before."""
    saved: int
    """Tokens that the session had read when it was saved."""

    @classmethod
    def of(cls, session: Session) -> "Reading | None":
        """The newest reading of a session, if it had any."""
        try:
            return cls(**json.loads(session.origin.tags["reading"]))
        except KeyError:
            return None
        except (ValueError, TypeError) as error:
            raise ValueError(f"the memory's tag 'reading' is damaged: {error}") from None


def read(argv: list[str]) -> None:
    """`lmsleep read MODEL FILE... --memory MEMORY`."""
    options = parse(ReadOptions, argv, "lmsleep read")
    if not options.files:
        raise ValueError("files must name at least one file")
    if not options.save_every >= 0:
        raise ValueError(f"save_every must not be negative, got {options.save_every}")
    tags = dict(_tag(tag) for tag in options.tag)
    new = new_session(options.model, options)
    assert new.tokenizer is not None
    tokens, hashes = _tokens(options.files, new.tokenizer)
    with locked(options.memory):
        session = _begin(options, new)
        reading = _reading(session, hashes, len(tokens), options.memory)
        _read_on(session, tokens, reading, options, tags)
    sys.stdout.write(f"{options.memory}: {status(session)}\n")


def _tag(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key or key == "reading":
        raise ValueError(f"tag must be KEY=VALUE (and the key 'reading' is taken), got {text!r}")
    return key, value


def _tokens(files: Sequence[Path], tokenizer: Tokenizer) -> tuple[Tensor, list[str]]:
    """The tokens of all files, and the SHA-256 of each file."""
    tokens, hashes = [], []
    for path in files:
        data = path.read_bytes()
        hashes.append(hashlib.sha256(data).hexdigest())
        if isinstance(tokenizer, Bytes):
            tokens.append(np.frombuffer(data, dtype=np.uint8))
            continue
        try:
            tokens.append(np.array(tokenizer.encode(data.decode()), dtype=np.int64))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return torch.from_numpy(np.concatenate(tokens)), hashes


def _begin(options: ReadOptions, new: Session) -> Session:
    if options.memory.exists():
        return take_up(options.memory, new, options)
    return new if options.parent is None else take_up(options.parent, new, options).fork()


def _reading(session: Session, hashes: list[str], tokens: int, path: Path) -> Reading:
    before = Reading.of(session)
    now = session.stream.tokens
    if before is not None and before.saved < before.begin + before.tokens:
        if before.saved != now:
            raise ValueError(
                f"{path} was stopped while it read files, and was read on by something else since; "
                "read into another --memory"
            )
        if before.files != hashes:
            raise ValueError(f"{path} was stopped while it read other files; read those to their end first")
    if before is not None and before.files == hashes:
        return before
    return Reading(files=hashes, tokens=tokens, begin=now, saved=now)


def _save(session: Session, reading: Reading, options: ReadOptions, tags: dict[str, str]) -> None:
    at = replace(reading, saved=session.stream.tokens)
    session.save(options.memory, tags={**tags, "reading": json.dumps(vars(at))})


def _read_on(
    session: Session, tokens: Tensor, reading: Reading, options: ReadOptions, tags: dict[str, str]
) -> None:
    piece = WINDOWS * (session.sleep_config.window or WITHOUT_WINDOW)
    saved = time.monotonic()
    done = session.stream.tokens - reading.begin
    with tqdm(total=len(tokens), initial=done, unit="token", unit_scale=True, disable=None) as bar:
        try:
            while done < len(tokens):
                session.read(tokens[done : done + piece].long())
                bar.update(session.stream.tokens - reading.begin - done)
                done = session.stream.tokens - reading.begin
                if time.monotonic() - saved >= options.save_every:
                    _save(session, reading, options, tags)
                    saved = time.monotonic()
            if options.sleep:
                session.sleep()
        except (KeyboardInterrupt, BrokenSleep):
            _save(session, reading, options, tags)
            raise
    _save(session, reading, options, tags)
