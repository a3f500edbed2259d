"""What stays in attention after a sleep."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmsleep.plain import check_types
from lmsleep.plugins import Plugin, derives_from
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


EVICTIONS: dict[str, type[Eviction]] = {"hard": Hard, "sliding": Sliding}

EVICTION = Plugin(
    what="eviction",
    noun="class",
    group="lmsleep.evictions",
    is_one=derives_from(Eviction),
    must_be="a dataclass (of options) with all methods of lmsleep.Eviction",
)


def evict(eviction: Eviction, state: State, L: int, going_on: Tensor | None = None) -> State:
    """Return `state` after a sleep: its fast weights, and of its working memory what `eviction` keeps.

    Args:
        eviction: what stays.
        state: the state after a window.
        L: tokens of a full window.
        going_on: `[B]` bool: rows whose text has ended keep their whole working memory. None: all go on.
    """
    cache = state.cache
    if cache.filled is None or eviction.takes_padding:
        kept = eviction.keep(cache, L)
    else:
        alone = State(Memory(()), cache).split()
        kept = State.join([State(Memory(()), eviction.keep(row.cache, L)) for row in alone]).cache
    if going_on is None or bool(going_on.all()):
        return State(state.memory, kept)
    rows = [going_on.nonzero()[:, 0], (~going_on).nonzero()[:, 0]]
    caches = [State(Memory(()), cache[some]) for cache, some in zip((kept, cache), rows, strict=True)]
    return State(state.memory, State.join(caches, torch.cat(rows).argsort()).cache)
