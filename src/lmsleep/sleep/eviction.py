"""What stays in attention after a sleep."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmsleep.plain import check_types
from lmsleep.sleep.backbone import Backbone, Opens
from lmsleep.state import Cache, Memory, State


@dataclass(frozen=True)
class Eviction(ABC):
    """Decides what is left of the working memory when a window has been slept on.

    One of your own is a frozen dataclass with these methods; `SleepConfig(eviction=...)` takes an instance or
    the name `FILE.py:CLASS`. L is `SleepConfig.window`.
    """

    takes_padding: ClassVar[bool] = False
    """`keep` may be given rows of different length (`Cache.filled`); else it gets such rows one by one."""

    def __post_init__(self) -> None:
        check_types(self)

    @abstractmethod
    def keep(self, cache: Cache, L: int) -> Cache:
        """Return what stays of `cache`, the working memory at the end of a window of L tokens."""

    def keep_by(self, model: Backbone, tokens: Tensor, state: State, L: int) -> Cache:
        """Return what stays of `state`, where that depends on the model; else it is what `keep` says.

        Args:
            model: that read the window.
            tokens: `[B, n]` int64, those of the window, of all rows as many; without padding unless
                `takes_padding`.
            state: at its end.
            L: tokens of a full window.
        """
        del model, tokens
        return self.keep(state.cache, L)

    def kept_bytes(self, model: Backbone, cache: Cache, L: int) -> int:
        """Return how many bytes of a row stay at most of `cache`, what it holds at the end of a window."""
        del model
        return self.keep(cache, L).nbytes

    def check(self, model: Backbone) -> None:  # noqa: B027 (most fit every model)
        """Refuse a model of which nothing could be kept so.

        Raises:
            ValueError: with the reason.
        """

    def span(self, L: int) -> int | None:
        """Return how many positions a token attends to at most, itself included; None: all that are there."""
        del L
        return None


@dataclass(frozen=True)
class Hard(Eviction):
    """Nothing stays: only S crosses the end of a window (the paper's hard eviction)."""

    takes_padding: ClassVar[bool] = True

    def keep(self, cache: Cache, L: int) -> Cache:
        """Return the empty working memory."""
        return cache.last(0)


@dataclass(frozen=True)
class Sliding(Eviction):
    """The newest L - 1 tokens stay, so that every token attends to L tokens (the paper's sliding window)."""

    takes_padding: ClassVar[bool] = True

    def keep(self, cache: Cache, L: int) -> Cache:
        """Return the newest L - 1 positions."""
        return cache.last(L - 1)

    def span(self, L: int) -> int:
        """Return L: a token attends to itself and the L - 1 before it."""
        return L


def evict(
    eviction: Eviction,
    model: Backbone,
    tokens: Tensor,
    state: State,
    L: int,
    *,
    valid: Tensor | None = None,
    going_on: Tensor | None = None,
) -> State:
    """Return `state` after a sleep: its fast weights, and of its working memory what `eviction` keeps.

    Args:
        eviction: what stays.
        model: that read the window.
        tokens: `[B, n]` int64, the tokens of the window.
        state: the state after them.
        L: tokens of a full window.
        valid: `[B, n]` bool, False for padding behind the tokens of a row; None: there is none.
        going_on: `[B]` bool: rows whose text has ended keep their whole working memory. None: all go on.
    """
    cache = state.cache
    if cache.filled is None or eviction.takes_padding:
        kept = eviction.keep_by(model, tokens, state, L)
    else:
        counts = [tokens.shape[1]] * len(tokens) if valid is None else valid.sum(dim=1).tolist()
        kept = State.join(
            [
                State(Memory(()), eviction.keep_by(model, tokens[i : i + 1, :count], row, L))
                for i, (row, count) in enumerate(zip(state.split(), counts, strict=True))
            ]
        ).cache
    if isinstance(model, Opens):
        kept = model.opened(State(state.memory, kept)).cache
    if going_on is None or bool(going_on.all()):
        return State(state.memory, kept)
    rows = [going_on.nonzero()[:, 0], (~going_on).nonzero()[:, 0]]
    caches = [State(Memory(()), cache[some]) for cache, some in zip((kept, cache), rows, strict=True)]
    return State(state.memory, State.join(caches, torch.cat(rows).argsort()).cache)
