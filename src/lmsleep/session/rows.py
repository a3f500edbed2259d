"""Advance rows one step together: each reads what it was given, answers, sleeps, and has ended.

`advance` is a function of any set of rows to the same rows a step further. A row is a value, so rows may
join and leave between two steps, be left out of one, or be gone back to: nothing but the caller's list says
who is there. What becomes of a row does not depend on those beside it, up to the rounding of matrix products
of another shape. This is what a server needs for continuous batching.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lmsleep.session import stream
from lmsleep.session.answer import Answer, Piece
from lmsleep.session.sampling import Sampling
from lmsleep.session.stream import Stream, no_tokens
from lmsleep.sleep import Backbone, SleepConfig


class BrokenSleep(RuntimeError):
    """A sleep left NaN or infinity; the memory before it was kept, the tokens of its window are not read."""


COPIED = 64  # tokens of a window: copying them, for each row, costs about as much as one pass more


class Odds(NamedTuple):
    """How likely a drawn token was.

    Attributes:
        token: the token.
        log_p: its log-likelihood in nats, by the model alone: before temperature, top k and top p.
        likeliest: the likeliest tokens at its place with theirs, likeliest first.
    """

    token: int
    log_p: float
    likeliest: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, token: int, logits: Tensor, count: int) -> Self:
        """Return the odds of a token drawn from logits `[V]`, with those of the `count` likeliest."""
        log_p = logits.double().cpu().log_softmax(-1)
        top = log_p.topk(min(count, len(log_p)))
        likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return cls(token, float(log_p[token]), tuple(likeliest))


class Turn(NamedTuple):
    """The next step of a row.

    Attributes:
        tokens: how many of its unread tokens it reads.
        passes: N of the sleep that follows on its window; 0: the row stays awake.
        logits: whether the head is computed for these tokens.
    """

    tokens: int
    passes: int
    logits: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """A stream on its way, as a value: it reads `unread`, then writes an answer, then takes a nap.

    Attributes:
        stream: how far it is.
        unread: `[n]`, tokens that it still has to read, of any dtype of whole numbers. While a row writes it
            is the token that was drawn last: shown, but not yet read.
        budget: most tokens that it still writes once all is read; set it to 0 to end an answer early.
        answer: what it has written; its tokenizer and stops.
        sampling: how its tokens are drawn.
        generator: of its draws.
        nap: N of a sleep on the open window once all is read and written; 0: none.
        keep_logits: whether `logits` are wanted of every token that is read.
        keep_odds: how many of the likeliest tokens `odds` tells of beside the drawn one; None: no odds.
        logits: `[t, V]` after each token that the last step read, if they are kept.
        pieces: what the last step added to the answer: pieces of text, or tokens where there is no tokenizer.
        odds: of the token that the last step drew, if they are kept.
        error: what ended this row alone: `BrokenSleep`, or whatever its draw or its tokenizer raised.
        seconds_awake: time of its steps without a sleep; a step counts for each row in it.
        seconds_asleep: time of its steps with one.

    Raises:
        ValueError: for a row that should write with nothing to go on from: no token unread, an empty window.
    """

    stream: Stream
    unread: Tensor = field(default_factory=no_tokens)
    budget: int = 0
    answer: Answer = field(default_factory=lambda: Answer(None, ()))
    sampling: Sampling = field(default_factory=Sampling)
    generator: torch.Generator = field(default_factory=torch.Generator)
    nap: int = 0
    keep_logits: bool = False
    keep_odds: int | None = None
    logits: Tensor | None = None
    pieces: tuple[Piece, ...] = ()
    odds: Odds | None = None
    error: Exception | None = None
    seconds_awake: float = 0.0
    seconds_asleep: float = 0.0

    def __post_init__(self) -> None:
        # A row that broke may well have an empty window.
        if self.budget and not len(self.unread) and not len(self.stream.window) and self.error is None:
            raise ValueError("prompt must have at least one token: the window is empty")

    @property
    def done(self) -> bool:
        """Say whether it has read, written and slept all, or broke."""
        # A nap on an empty window is none, as `Session.sleep` says.
        naps = self.nap and len(self.stream.window)
        return self.error is not None or not (len(self.unread) or self.budget or naps)

    def turn(self, sleep: SleepConfig, most: int | None = None) -> Turn:
        """Say what it would do in the next step, so that a scheduler can tell sleepers from the others.

        `most` is how many tokens it reads in one step; None: to the end of its window.
        """
        n = len(self.unread)
        room = n if sleep.window is None else sleep.window - len(self.stream.window)
        if most is not None and most < min(n, room):
            return Turn(most, 0, self.keep_logits)
        # A window that is just full (n == room) stays open: it sleeps when the next token comes.
        if n > room:  # the stream goes on after this window
            return Turn(room, sleep.passes, self.keep_logits)
        if self.budget and n > 1 and not self.keep_logits:  # the head is for the last token alone
            return Turn(n - 1, 0, False)
        if self.nap and not self.budget:  # the nap comes last, after the answer
            return Turn(n, self.nap, self.keep_logits)
        return Turn(n, 0, self.keep_logits or self.budget > 0)

    def drawn(self, logits: Tensor) -> Self:
        """Return the row with its next token, drawn from logits `[V]`, or with the error that this raised."""
        # Both would be changed in place, and this row may be drawn from again: rows are values.
        answer, generator = self.answer.copy(), self.generator.clone_state()
        try:
            token = self.sampling.draw(logits, generator)
            answer.add(token)
            budget = 0 if answer.stopped else self.budget - 1
            pieces = tuple(answer.pieces(last=budget == 0))
            odds = None if self.keep_odds is None else Odds.of(token, logits, self.keep_odds)
        except Exception as error:  # of these logits or of this tokenizer: the rows beside it go on
            return replace(self, error=error)
        return replace(
            self,
            unread=torch.tensor([token]),
            budget=budget,
            answer=answer,
            generator=generator,
            pieces=pieces,
            odds=odds,
        )


def advance(
    model: Backbone, sleep: SleepConfig, rows: Sequence[Row], *, most: int | None = None
) -> list[Row]:
    """Take each row one step further; a row that is done stays as it is.

    In a step a row reads to the end of its window at most. Rows whose stream goes on after it sleep, all
    together, and read on in the next step; all others read awake: prompts together, and together those that
    come to a token after which one is drawn, which is in `pieces` at once and is read in the next step. So a
    step takes as many passes as there are groups, a sleep N of them; who may not wait for sleepers calls
    `advance` with the others first (`Row.turn`).

    Args:
        model: any `Backbone`.
        sleep: how it sleeps, the same for all rows, with one wake pass.
        rows: any number; they are not changed, so after an exception the step can be taken again.
        most: most tokens that a row reads in this step; None: to the end of its window. Shorter steps keep
            others waiting less, and change what is read by rounding alone.

    Returns:
        As many rows, in the same order. One whose sleep left NaN or infinity, or whose draw or tokenizer
        raised, has it as its `error`; the others are not disturbed.
    """
    # These tell of the last step alone.
    after = [replace(row, logits=None, pieces=(), odds=None) for row in rows]
    groups, waiting = dict[tuple[int, bool, bool], list[int]](), list[int]()
    writing = [row for row in rows if row.budget and row.answer.tokens]
    join_after = max((len(row.stream.window) for row in writing), default=0) // COPIED
    settled = any(len(row.answer.tokens) >= join_after for row in writing)
    for i, row in enumerate(rows):
        if row.done:
            continue
        turn = row.turn(sleep, most)
        if not turn.tokens and not turn.passes:  # no prompt: an answer goes on from the open window
            waiting.append(i)
        else:
            # Those with as many passes, and as much need of the head, share every pass of this step; but
            # who has just begun to write joins no batch that it may soon leave: both copy all of it.
            begins = settled and turn.logits and len(row.answer.tokens) < join_after
            groups.setdefault((turn.passes, turn.logits, begins), []).append(i)
    if waiting:
        known = stream.next_logits(model, sleep, [rows[i].stream for i in waiting])
        for i, seen in zip(waiting, known, strict=True):
            after[i] = after[i].drawn(seen)
    for (passes, logits, _), group in groups.items():
        stepped = _read(model, sleep, [after[i] for i in group], passes=passes, logits=logits, most=most)
        for i, row in zip(group, stepped, strict=True):
            after[i] = row
    return after


def _read(
    model: Backbone,
    sleep: SleepConfig,
    rows: Sequence[Row],
    *,
    passes: int,
    logits: bool,
    most: int | None,
) -> Iterable[Row]:
    """Yield the rows after they took the same turn, but for how many tokens each of them reads."""
    counts = [row.turn(sleep, most).tokens for row in rows]
    # Only now int64: `unread` may be a whole file, in uint8.
    new = [row.unread[:n].long() for row, n in zip(rows, counts, strict=True)]
    streams = [row.stream for row in rows]
    begin = time.perf_counter()
    if passes:
        step = stream.asleep(model, sleep, streams, new, passes=passes, logits=logits)
    else:
        step = stream.awake(model, sleep, streams, new, logits=logits)
    seconds = time.perf_counter() - begin
    out: Sequence[Tensor | None] = step.logits or [None] * len(rows)
    for i, (row, n) in enumerate(zip(rows, counts, strict=True)):
        read = replace(
            row,
            stream=step.streams[i],
            unread=row.unread[n:],
            # A window that fills before all is read sleeps by itself; the nap is then still to come.
            nap=0 if n == len(row.unread) and passes else row.nap,
            logits=out[i] if row.keep_logits else None,
            error=_broken(step.streams[i]) if i in step.broken else None,
            seconds_awake=row.seconds_awake + (0.0 if passes else seconds),
            seconds_asleep=row.seconds_asleep + (seconds if passes else 0.0),
        )
        # The prompt is read to its end: its last logits give the next token, in the same step.
        last = out[i]
        writes = read.budget and not len(read.unread) and read.error is None
        yield read.drawn(last[-1]) if writes and last is not None else read


def raise_first(rows: Sequence[Row]) -> None:
    """Raise what ended a row, if any did; several broken sleeps as one `BrokenSleep` that names the rows."""
    failed = {i: row.error for i, row in enumerate(rows) if row.error is not None}
    if not failed:
        return
    # What is no broken sleep goes first: it may be a fault of the caller, and says more as it is.
    others = [error for error in failed.values() if not isinstance(error, BrokenSleep)]
    if others or len(rows) == 1:
        raise (others or [*failed.values()])[0]
    raise BrokenSleep(_said(", ".join(f"row {i}: token {rows[i].stream.tokens}" for i in failed)))


def _broken(after: Stream) -> BrokenSleep:
    return BrokenSleep(_said(f"token {after.tokens}"))


def _said(where: str) -> str:
    return (
        f"a sleep left NaN or infinity ({where}); the memory before it was kept, "
        "and the tokens of that window are not read"
    )
