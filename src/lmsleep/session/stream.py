"""Keep a stream of tokens as a value, and say what happens to streams: they are read awake, or slept on.

Streams that stand at different places of their windows are read together: their working memories are joined
with padding, which nothing sees. As long as the same streams go on together, what they carry stays joined.
A sleep reads its window again from where the window began, all N passes of it: what it leaves is a function
of the memory before it and of the window's tokens, however they came.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lmsleep.sleep import Backbone, SleepConfig, evict, read_window
from lmsleep.state import State


def no_tokens() -> Tensor:
    """Return `[0]` int64."""
    return torch.empty(0, dtype=torch.int64)


class Batch:
    """The state of streams that were read together; each of them may be taken out of it (`views`)."""

    def __init__(self, state: State, rows: int, *, alone: bool = False) -> None:
        # alone: one row, in a storage with nothing else in it: no other rows, no room to grow into.
        self.state, self.rows, self.alone = state, rows, alone
        self._views: list[State] | None = None

    @property
    def views(self) -> list[State]:
        """Return the rows as batches of one, in the storage of this one."""
        if self._views is None:
            self._views = self.state.views()
        return self._views


class Share:
    """What one stream carries: a row of a batch, or a state of its own once somebody asked for it.

    The batch lives until its last row is taken out or forgotten.
    """

    def __init__(self, batch: Batch, row: int) -> None:
        # One attribute, for two threads may ask at once: each finds the row in the batch or by itself.
        self._held: tuple[Batch, int] = batch, row

    @classmethod
    def of(cls, state: State) -> Self:
        """Return a state of one row as it is."""
        return cls(Batch(state, 1, alone=True), 0)

    def take(self) -> State:
        """Return the state as a batch of one that keeps nothing else alive."""
        batch, row = self._held
        if not batch.alone:
            batch, row = self._held = Batch(batch.views[row].clone(), 1, alone=True), 0
        return batch.state

    @property
    def nbytes(self) -> int:
        """Count the bytes of the state, which stays where it is."""
        batch, row = self._held
        return size(batch.views[row])

    @staticmethod
    def joined(shares: Sequence["Share"]) -> tuple[State, list[int]]:
        """Return the states of these streams in one batch, and which stream each of its rows is.

        Those that are a whole batch already are not copied.
        """
        held = [share._held for share in shares]
        batch = held[0][0]
        order = sorted(range(len(held)), key=lambda i: held[i][1])
        if all(b is batch for b, _ in held) and [held[i][1] for i in order] == [*range(batch.rows)]:
            return batch.state, order
        return State.join([b.views[row] for b, row in held]), [*range(len(held))]


@dataclass(frozen=True, eq=False)
class Stream:
    """Says how far one stream is.

    Attributes:
        start: fast weights and working memory where the open window began; one row.
        share: the same after the tokens of the window, read awake; see `state`.
        window: `[n]` int64, those tokens.
        tokens: tokens read in all.
        sleeps: sleeps in all.
        peak: most bytes that a state took before the open window.
    """

    start: State
    share: Share
    window: Tensor = field(default_factory=no_tokens)
    tokens: int = 0
    sleeps: int = 0
    peak: int = 0

    @classmethod
    def begin(cls, state: State, *, tokens: int = 0, sleeps: int = 0, peak: int = 0) -> Self:
        """Return a stream with an empty window, which begins with `state`."""
        return cls(state, Share.of(state), tokens=tokens, sleeps=sleeps, peak=peak)

    @property
    def state(self) -> State:
        """Fast weights and working memory after the tokens of the window; one row, in a storage of its own.

        A stream that was read along with others is taken out of their batch when this is first asked for.
        """
        return self.share.take()

    @property
    def nbytes(self) -> int:
        """Count the bytes of `state`, without taking it out of a batch."""
        return self.share.nbytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes that `state` ever took: within a window it only grows."""
        return max(self.peak, self.nbytes)

    def reopened(self) -> Self:
        """Return the stream where its window began: the tokens of the window are not read."""
        return replace(
            self,
            share=Share.of(self.start),
            window=no_tokens(),
            tokens=self.tokens - len(self.window),
            peak=self.peak_bytes,
        )


class Step(NamedTuple):
    """Streams after they were read on, awake or asleep.

    Attributes:
        streams: each of them now.
        logits: `[t, V]` each, after every token that was new; None unless asked for, and if none was.
        broken: which of them had a sleep that left NaN or infinity; they are back where their window began.
    """

    streams: list[Stream]
    logits: list[Tensor] | None
    broken: list[int]


def size(state: State) -> int:
    """Count the bytes of fast weights and working memory."""
    return state.memory.nbytes + state.cache.nbytes


def awake(
    model: Backbone,
    sleep: SleepConfig,
    streams: Sequence[Stream],
    new: Sequence[Tensor],
    *,
    logits: bool = False,
) -> Step:
    """Read `new` tokens of the open windows in one ordinary pass."""
    out, shares = _pass(model, sleep, [s.share for s in streams], new, 1, logits)
    after = [
        replace(
            stream,
            share=share,
            window=torch.cat([stream.window, tokens]),
            tokens=stream.tokens + len(tokens),
        )
        for stream, share, tokens in zip(streams, shares, new, strict=True)
    ]
    return Step(after, out, [])


def asleep(
    model: Backbone,
    sleep: SleepConfig,
    streams: Sequence[Stream],
    new: Sequence[Tensor],
    *,
    passes: int,
    logits: bool = False,
) -> Step:
    """Read `new` tokens of the open windows, then sleep on these windows and evict them."""
    windows = [torch.cat([stream.window, tokens]) for stream, tokens in zip(streams, new, strict=True)]
    # Tokens read before were shown then: a sleep without new ones needs no head.
    logits = logits and any(map(len, new))
    # From the beginning of the window, not from `state`: pass 1 of the sleep is its wake pass, and the tokens
    # may have come in any portions.
    out, shares = _pass(model, sleep, [Share.of(s.start) for s in streams], windows, passes, logits)
    after, broken = [], []
    for row, (stream, share, tokens) in enumerate(zip(streams, shares, new, strict=True)):
        state = share.take()
        begin = state
        if sleep.window is not None:
            window = windows[row][None].to(model.device)
            begin = evict(sleep.eviction, model, window, state, sleep.window)
        # Of what stays: NaN in keys that are evicted harms nobody.
        if not all(bool(t.isfinite().all()) for t in begin.tensors()):
            broken.append(row)
            after.append(stream.reopened())
            continue
        # The peak is that before the eviction, when the whole window was still held.
        peak, read = max(stream.peak_bytes, size(state)), stream.tokens + len(tokens)
        after.append(Stream.begin(begin, tokens=read, sleeps=stream.sleeps + 1, peak=peak))
    if out is not None:
        # Only the new ones; counted from the front, since x[-0:] would be all.
        out = [x[len(x) - len(tokens) :] for x, tokens in zip(out, new, strict=True)]
    return Step(after, out, broken)


@torch.no_grad()
def _pass(
    model: Backbone,
    sleep: SleepConfig,
    shares: Sequence[Share],
    tokens: Sequence[Tensor],
    passes: int,
    logits: bool,
) -> tuple[list[Tensor] | None, list[Share]]:
    """Call `read_window` for rows of any length, each with a state of its own."""
    state, order = Share.joined(shares)
    ordered = [tokens[i] for i in order]
    lengths = [len(t) for t in ordered]
    ragged = len(set(lengths)) > 1
    padded = torch.nn.utils.rnn.pad_sequence(ordered, batch_first=True).to(model.device)
    # Rows of one length need no mask, and take the shorter way through the layers.
    valid = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None] if ragged else None
    out, state = read_window(
        model,
        padded,
        state,
        sleep,
        passes=passes,
        valid=None if valid is None else valid.to(model.device),
        logits=logits,
    )
    batch, place = Batch(state, len(order)), {i: row for row, i in enumerate(order)}
    rows = None if out is None else [out[place[i]][: len(t)] for i, t in enumerate(tokens)]
    return rows, [Share(batch, place[i]) for i in range(len(tokens))]


def next_logits(model: Backbone, sleep: SleepConfig, streams: Sequence[Stream]) -> list[Tensor]:
    """Return the logits `[V]` after the last token of each open window, which is read once more for them.

    The streams stay as they are, and none may have an empty window.
    """
    # Twice, since the head of the model is computed for all tokens of a pass or none, and one is wanted.
    begun = [stream.reopened() for stream in streams]
    read = awake(model, sleep, begun, [stream.window[:-1] for stream in streams]).streams
    out = awake(model, sleep, read, [stream.window[-1:] for stream in streams], logits=True).logits
    assert out is not None
    return [logits[-1] for logits in out]
