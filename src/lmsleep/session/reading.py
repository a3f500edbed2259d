"""Read files into a session so that a kill costs nothing: it is saved on the way and taken up again."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmsleep.files import check_place
from lmsleep.plain import check_types
from lmsleep.progress import progress as bar_of
from lmsleep.session.owner import proceed, using
from lmsleep.session.rows import BrokenSleep, Row
from lmsleep.session.session import Session
from lmsleep.text.files import read_text, to_tokens
from lmsleep.text.tokenizers import Tokenizer, check_tokens

TAG = "reading"  # of a memory file: which files it was reading, and how far it was


@dataclass(frozen=True)
class _Reading:
    """Says which files are read, from where on in the life of the session; kept in the memory's tags."""

    files: list[str]
    """SHA-256 of the text in each."""
    tokens: int
    """Tokens in all of them."""
    begin: int
    """Tokens that the session had read before."""
    saved: int
    """Tokens that the session had read when it was saved."""

    @classmethod
    def of(cls, session: Session) -> "_Reading | None":
        """Return the newest reading of a session, if it had any."""
        try:
            said = cls(**json.loads(session.origin.tags[TAG]))
            check_types(said)
            if not 0 <= said.begin <= said.saved or said.tokens < 0:
                raise ValueError("its counts contradict each other")
        except KeyError:
            return None
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"the memory's tag {TAG!r} is damaged: {error}; read into another memory"
            ) from None
        return said

    @property
    def end(self) -> int:
        """Count the tokens that the session has read once the files are."""
        return self.begin + self.tokens


def read_files(
    session: Session,
    files: Sequence[str | Path],
    *,
    save: str | Path | None = None,
    save_every: float = 30.0,
    tags: Mapping[str, str] | None = None,
    progress: bool = False,
) -> None:
    """Read files, one after the other, sleeping at window ends; go on where a killed reading of them was.

    The memory file in `save` says which files were being read and how far. After a kill, load the session
    from it and call this again with the same files: it ends with exactly the memory of an uninterrupted
    reading. Files that the session has just read are not read twice, others are read on top of them. All
    files are held in main memory, one byte a token in bytes, four with any other tokenizer.

    Args:
        session: reads, with its tokenizer; `rewind()` takes the files back together.
        files: text in UTF-8 (any bytes for `Bytes`), or UTF-16 or UTF-32 with a mark of the byte order; also
            packed by gzip, bzip2 or xz. Formats that are known to hold no text are refused.
        save: memory file to write: every `save_every` seconds, in the end, and when an interrupt or a broken
            sleep ends the reading. No lock is taken. None: nothing is saved, and a kill loses what was read.
        save_every: seconds between saves; 0: after every step (a window, with its sleep).
        tags: added to those of the memory file; the tag "reading" is taken.
        progress: show a bar on standard error; where there is no terminal, a line every ten seconds.

    Raises:
        ValueError: for no file, a session without a tokenizer, text that the tokenizer cannot read, tags that
            are no texts or the one that is taken, or a session that was stopped in other files, with another
            tokenizer, or read on by
            something else since.
        OSError: if a file cannot be read or written.
        RuntimeError: if another thread uses the session.
        BrokenSleep: as `Session.read`.
    """
    if not files:
        raise ValueError("files must name at least one file")
    if not save_every >= 0:  # so written, it refuses NaN as well
        raise ValueError(f"save_every must not be negative, got {save_every}")
    if TAG in (tags or {}):
        raise ValueError(f"tags: the key {TAG!r} is taken; it says which files were read")
    replace(session.origin, tags=dict(tags or {}))  # refuses what cannot be saved, before all is read
    if save is not None:
        check_place(Path(save))
    if session.tokenizer is None:
        raise ValueError("files need a tokenizer: this session has none")
    paths = [Path(file) for file in files]
    texts = [read_text(path) for path in paths]
    hashes = [hashlib.sha256(text).hexdigest() for text in texts]
    before, begin = _goes_on(session, hashes), session.stream.tokens
    # What stands before a text stands before the first alone, and only where nothing was read before.
    begins = not (begin if before is None else before.begin)
    tokens = _tokens(paths, texts, session.tokenizer, begins=begins)
    check_tokens(tokens, session.model.vocab_size, session.tokenizer)
    reading = before or _Reading(files=hashes, tokens=len(tokens), begin=begin, saved=begin)
    if reading.tokens != len(tokens):
        raise ValueError(
            f"the memory read these files as {reading.tokens} tokens, and now they are {len(tokens)}; "
            "use the tokenizer that it read them with"
        )

    def write() -> None:
        if save is not None:
            now = json.dumps(vars(replace(reading, saved=session.stream.tokens)))
            session.save(save, tags={**(tags or {}), TAG: now})

    # A finished reading of these files has nothing left, though the session may have read on since.
    done = min(session.stream.tokens - reading.begin, len(tokens))
    row = Row(stream=session.stream, unread=tokens[done:])
    saved = time.monotonic()  # the clock on the wall may be set back
    # Held over all steps: who comes between is refused, not this reading in its middle.
    bar = bar_of(show=progress, total=len(tokens), initial=done, unit="token", unit_scale=True)
    with using([session]), bar:
        try:
            for [stepped] in proceed([session], [row]):
                bar.update(len(tokens) - len(stepped.unread) - bar.n)
                if time.monotonic() - saved >= save_every:
                    write()
                    saved = time.monotonic()
        except (KeyboardInterrupt, BrokenSleep):
            # The session stands at a whole step in both cases, so what was read since the last save is good.
            write()
            raise
    write()


def _tokens(files: Sequence[Path], texts: Sequence[bytes], tokenizer: Tokenizer, *, begins: bool) -> Tensor:
    """Return the tokens of all files, uint8 of bytes and else int32.

    If the stream `begins` with them, the first text of all has before it what the tokenizer puts there.
    """
    # As they are, an eighth or half of int64; a step makes int64 of what it reads.
    tokens: list[np.ndarray] = []
    for path, text in zip(files, texts, strict=True):
        first = begins and not any(map(len, tokens))
        tokens.append(to_tokens(text, tokenizer, path, first=first))
    return torch.from_numpy(np.concatenate(tokens))


def _goes_on(session: Session, hashes: list[str]) -> _Reading | None:
    """Return the reading of these files that the session was stopped in, or is through with."""
    before, now = _Reading.of(session), session.stream.tokens
    # Stopped on the way: its tokens are counted from `begin`, so nothing else may have come between.
    if before is not None and before.saved < before.end:
        if before.saved != now:
            raise ValueError(
                "the memory was stopped while it read files, and was read on by something else since; "
                "read into another one"
            )
        if before.files != hashes:
            raise ValueError(
                "the memory was stopped while it read other files; read those to their end first"
            )
    # Stopped in these files, or through with them: then there is nothing to read, and nothing is read twice.
    if before is not None and before.files == hashes and (before.saved < before.end or now >= before.end):
        return before
    return None
