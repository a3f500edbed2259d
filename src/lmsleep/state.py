"""What a sleeping model carries: fast weights (`Memory`), the window's working memory (`Cache`).

Pure data. Nothing here computes a model; every value is immutable and every operation returns a
new one, so that a window can be checkpointed, forked or replayed without copies by hand.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

Rows = Tensor | Sequence[int] | slice


@dataclass(frozen=True, eq=False)
class Memory:
    """The fast weights `S`: all that crosses a window under hard eviction.

    Attributes:
        layers: one entry per block: a tensor `[B, H, K, V]` (heads, key size, value size), float32
            or float64, for a block with fast weights, `None` for a block without (attention).
    """

    layers: tuple[Tensor | None, ...]

    @classmethod
    def zeros(
        cls,
        shapes: Iterable[tuple[int, int, int] | None],
        batch_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """`S = 0`, as every sequence begins (Algorithm 1). `shapes`: `(H, K, V)` or None a block."""
        return cls(
            tuple(
                None if s is None else torch.zeros(batch_size, *s, dtype=dtype, device=device) for s in shapes
            )
        )

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """A memory with `fn` applied to the fast weights of every block."""
        return type(self)(tuple(None if s is None else fn(s) for s in self.layers))

    def detach(self) -> Self:
        """The same values, cut from the autograd graph."""
        return self.map(Tensor.detach)

    def clone(self) -> Self:
        """An independent copy (a snapshot)."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same memory on another device or in another dtype."""
        return self.map(lambda s: s.to(device=device, dtype=dtype))

    def __getitem__(self, rows: Rows) -> Self:
        """Rows of the batch: a slice, a list or index tensor (repeats fork a row), or a bool mask."""
        return self.map(lambda s: s[rows])

    @property
    def batch_size(self) -> int:
        """Rows in the batch (0 if no block has fast weights)."""
        return next((s.shape[0] for s in self.layers if s is not None), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all fast weights, all rows."""
        return sum(s.nbytes for s in self.layers if s is not None)

    def norms(self) -> Tensor:
        """Frobenius norm of `S` per row, block with fast weights, and head: `[B, blocks, H]`.

        Raises:
            ValueError: if the blocks differ in their number of heads.
        """
        norms = [torch.linalg.matrix_norm(s) for s in self.layers if s is not None]
        if len({n.shape for n in norms}) != 1:
            raise ValueError("norms() needs at least one block, all with the same number of heads")
        return torch.stack(norms, dim=1)


@dataclass(frozen=True, eq=False)
class Cache:
    """The working memory of the current window: keys and values, and tails of short convolutions.

    Attributes:
        layers: one tuple of tensors per block, each `[B, t, ...]` with time as dimension 1: the
            (unrotated) keys and values of an attention block, the last inputs of a short
            convolution; an empty tuple where a block needs neither.
    """

    layers: tuple[tuple[Tensor, ...], ...]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """A cache with `fn` applied to every tensor."""
        return type(self)(tuple(tuple(fn(t) for t in layer) for layer in self.layers))

    def last(self, tokens: int) -> Self:
        """What is left after eviction down to the newest `tokens` positions (0: nothing)."""
        return self.map(lambda t: t[:, max(t.shape[1] - tokens, 0) :])

    def detach(self) -> Self:
        """The same values, cut from the autograd graph."""
        return self.map(Tensor.detach)

    def __getitem__(self, rows: Rows) -> Self:
        """Rows of the batch, as for `Memory`."""
        return self.map(lambda t: t[rows])

    @property
    def nbytes(self) -> int:
        """Bytes of all cached tensors, all rows."""
        return sum(t.nbytes for layer in self.layers for t in layer)


class State(NamedTuple):
    """All that blocks carry from token to token: fast weights and working memory."""

    memory: Memory
    cache: Cache

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
            Cache(cache[:start] + tuple(c for _, c in blocks) + cache[stop:]),
        )

    @staticmethod
    def join(parts: Sequence["State"], order: Tensor) -> "State":
        """Concatenate the rows of `parts`, then take rows `order` of the result."""

        def joined(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(tensors))[order]

        memory = tuple(
            None if ss[0] is None else joined([s for s in ss if s is not None])
            for ss in zip(*(p.memory.layers for p in parts), strict=True)
        )
        cache = tuple(
            tuple(joined(ts) for ts in zip(*layers, strict=True))
            for layers in zip(*(p.cache.layers for p in parts), strict=True)
        )
        return State(Memory(memory), Cache(cache))
