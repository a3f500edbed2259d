"""Keep a stream of tokens as a value, and say what happens to streams: they are read awake, or slept on.

Streams that stand at different places of their windows are read together: their working memories are joined
with padding, which nothing sees. A sleep reads its window again from where the window began, all N passes of
it: what it leaves is a function of the memory before it and of the window's tokens, however they came.
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


@dataclass(frozen=True, eq=False)
class Stream:
    """Says how far one stream is.

    Attributes:
        start: fast weights and working memory where the open window began; one row.
        state: the same after the tokens of the window, read awake.
        window: `[n]` int64, those tokens.
        tokens: tokens read in all.
        sleeps: sleeps in all.
        peak_bytes: most bytes that `state` ever took.
    """

    start: State
    state: State
    window: Tensor = field(default_factory=no_tokens)
    tokens: int = 0
    sleeps: int = 0
    peak_bytes: int = 0

    @classmethod
    def begin(cls, state: State, *, tokens: int = 0, sleeps: int = 0) -> Self:
        """Return a stream with an empty window, which begins with `state`."""
        return cls(state, state, tokens=tokens, sleeps=sleeps, peak_bytes=size(state))

    def reopened(self) -> Self:
        """Return the stream where its window began: the tokens of the window are not read."""
        return replace(self, state=self.start, window=no_tokens(), tokens=self.tokens - len(self.window))


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
    out, states = _pass(model, sleep, [s.state for s in streams], new, 1, logits)
    after = [
        replace(
            stream,
            state=state,
            window=torch.cat([stream.window, tokens]),
            tokens=stream.tokens + len(tokens),
            peak_bytes=max(stream.peak_bytes, size(state)),
        )
        for stream, state, tokens in zip(streams, states, new, strict=True)
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
    out, states = _pass(model, sleep, [s.start for s in streams], windows, passes, logits)
    after, broken = [], []
    for row, (stream, state, tokens) in enumerate(zip(streams, states, new, strict=True)):
        begin = state if sleep.window is None else evict(sleep.eviction, state, sleep.window)
        # Of what stays: NaN in keys that are evicted harms nobody.
        if not all(bool(t.isfinite().all()) for t in begin.tensors()):
            broken.append(row)
            after.append(stream.reopened())
            continue
        read = stream.tokens + len(tokens)
        begun = Stream.begin(begin, tokens=read, sleeps=stream.sleeps + 1)
        # The peak is that before the eviction, when the whole window was still held.
        after.append(replace(begun, peak_bytes=max(stream.peak_bytes, size(state))))
    if out is not None:
        # Only the new ones; counted from the front, since x[-0:] would be all.
        out = [x[len(x) - len(tokens) :] for x, tokens in zip(out, new, strict=True)]
    return Step(after, out, broken)


@torch.no_grad()
def _pass(
    model: Backbone,
    sleep: SleepConfig,
    states: Sequence[State],
    tokens: Sequence[Tensor],
    passes: int,
    logits: bool,
) -> tuple[list[Tensor] | None, list[State]]:
    """Call `read_window` for rows of any length, each with a state of its own."""
    lengths = [len(t) for t in tokens]
    ragged = len(set(lengths)) > 1
    padded = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True).to(model.device)
    # Rows of one length need no mask, and take the shorter way through the layers.
    valid = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None] if ragged else None
    out, state = read_window(
        model,
        padded,
        State.join(states),
        sleep,
        passes=passes,
        valid=None if valid is None else valid.to(model.device),
        logits=logits,
    )
    # `split` gives every row storage of its own, so that one stream does not keep the others alive.
    rows = None if out is None else [row[:n] for row, n in zip(out, lengths, strict=True)]
    return rows, state.split()


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
