"""What a sleeping model carries: fast weights (`Memory`), the window's working memory (`Cache`).

Pure data. Nothing here computes a model; every value is immutable and every operation returns a
new one, so that a window can be checkpointed, forked or replayed without copies by hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lmsleep.memory import Memory, Rows

__all__ = ["Cache", "Memory", "State"]


@dataclass(frozen=True, eq=False)
class Cache:
    """The working memory of the current window: keys and values, and tails of short convolutions.

    Attributes:
        layers: one tuple of tensors per block, each `[B, t, ...]` with time as dimension 1: the
            (unrotated) keys and values of an attention block, the last inputs of a short
            convolution; an empty tuple where a block needs neither.
        filled: `[B]` int64, how many of the newest positions of each row are tokens; what is older is
            padding, zeros. None: all are tokens.
    """

    layers: tuple[tuple[Tensor, ...], ...]
    filled: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """A cache with `fn` applied to every tensor of its layers."""
        return replace(self, layers=tuple(tuple(fn(t) for t in layer) for layer in self.layers))

    @property
    def length(self) -> int:
        """Positions of its longest tensor."""
        return max((t.shape[1] for layer in self.layers for t in layer), default=0)

    def counts(self, batch_size: int) -> Tensor:
        """`[B]` int64: tokens that each of `batch_size` rows holds."""
        if self.filled is not None:
            return self.filled
        device = next((t.device for layer in self.layers for t in layer), None)
        return torch.full((batch_size,), self.length, device=device)

    def last(self, tokens: int) -> Self:
        """What is left after eviction down to the newest `tokens` positions (0: nothing)."""
        if tokens == 0:  # of what is evicted neither memory nor graph stays alive
            return replace(self.map(lambda t: t.new_empty(len(t), 0, *t.shape[2:])), filled=None)
        filled = None if self.filled is None else self.filled.clamp(max=tokens)
        return replace(self.map(lambda t: t[:, max(t.shape[1] - tokens, 0) :]), filled=filled)

    def keep(self, counts: Tensor) -> Self:
        """Of row b the newest `counts[b]` positions; older ones become padding, or go if all rows agree."""
        counts = counts if self.filled is None else torch.minimum(counts, self.filled)
        kept = replace(self.last(int(counts.max())), filled=None)
        if bool((counts >= kept.length).all()):
            return kept

        def blanked(t: Tensor) -> Tensor:
            age = torch.arange(t.shape[1] - 1, -1, -1, device=t.device)
            return t.masked_fill((age >= counts[:, None]).view(*t.shape[:2], *[1] * (t.ndim - 2)), 0)

        return replace(kept.map(blanked), filled=counts)

    def detach(self) -> Self:
        """The same values, cut from the autograd graph."""
        return self.map(Tensor.detach)

    def __getitem__(self, rows: Rows) -> Self:
        """Rows of the batch, as for `Memory`."""
        return replace(self.map(lambda t: t[rows]), filled=None if self.filled is None else self.filled[rows])

    @property
    def nbytes(self) -> int:
        """Bytes of all cached tensors, all rows."""
        return sum(t.nbytes for layer in self.layers for t in layer)


class State(NamedTuple):
    """All that blocks carry from token to token: fast weights and working memory."""

    memory: Memory
    cache: Cache

    @property
    def batch_size(self) -> int:
        """Rows in the batch (0 if it carries nothing)."""
        layers = (self.memory.layers, *self.cache.layers)
        return next((t.shape[0] for layer in layers for t in layer if t is not None), 0)

    def rows(self, rows: Rows) -> "State":
        """Rows of the batch."""
        return State(self.memory[rows], self.cache[rows])

    def detach(self) -> "State":
        """The same values, cut from the autograd graph."""
        return State(self.memory.detach(), self.cache.detach())

    def replace(self, start: int, blocks: Sequence[tuple[Tensor | None, tuple[Tensor, ...]]]) -> "State":
        """The state with blocks `start, start + 1, ...` replaced by new (fast weights, cache)."""
        stop = start + len(blocks)
        memory, cache = self.memory.layers, self.cache.layers
        return State(
            Memory(memory[:start] + tuple(s for s, _ in blocks) + memory[stop:]),
            Cache(cache[:start] + tuple(c for _, c in blocks) + cache[stop:], self.cache.filled),
        )

    def split(self) -> "list[State]":
        """The rows, each as a batch of one without padding; they share no storage."""
        single = [self.rows([row]) for row in range(self.batch_size)]
        counts = self.cache.counts(self.batch_size).tolist()
        return [
            State(s.memory, replace(s.cache.last(count), filled=None))
            for s, count in zip(single, counts, strict=True)
        ]

    def counted(self, began: Cache, tokens: int, valid: Tensor | None) -> "State":
        """This state, that of a window of `tokens`, with the positions that are filled in each row.

        Args:
            began: the working memory that the window began with.
            tokens: T, padding included.
            valid: `[B, T]` bool, False for padding; None: there is none.
        """
        if valid is None and began.filled is None:
            return self
        counts = began.counts(self.batch_size) + (tokens if valid is None else valid.sum(dim=1))
        return State(self.memory, replace(self.cache, filled=None).keep(counts))

    @staticmethod
    def join(parts: Sequence["State"], order: Tensor | None = None) -> "State":
        """Concatenate the rows of `parts`, and take rows `order` of the result (default: all, in order).

        Working memories of different length get padding before their first position.
        """

        def joined(tensors: Sequence[Tensor]) -> Tensor:
            rows = torch.cat(list(tensors))
            return rows if order is None else rows[order]

        def aligned(tensors: Sequence[Tensor]) -> Tensor:
            longest = max(t.shape[1] for t in tensors)
            padding = [(0, 0) * (t.ndim - 2) + (longest - t.shape[1], 0) for t in tensors]
            return joined([F.pad(t, p) if p[-2] else t for t, p in zip(tensors, padding, strict=True)])

        if len(parts) == 1 and order is None:
            return parts[0]
        memory = tuple(
            None if ss[0] is None else joined([s for s in ss if s is not None])
            for ss in zip(*(p.memory.layers for p in parts), strict=True)
        )
        cache = Cache(
            tuple(
                tuple(aligned(ts) for ts in zip(*layers, strict=True))
                for layers in zip(*(p.cache.layers for p in parts), strict=True)
            )
        )
        if len({p.cache.length for p in parts}) > 1 or any(p.cache.filled is not None for p in parts):
            cache = cache.keep(joined([p.cache.counts(p.batch_size) for p in parts]))
        return State(Memory(memory), cache)
