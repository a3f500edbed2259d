"""Hold what a sleeping model carries: fast weights (`Memory`), the window's working memory (`Cache`).

Pure data. Nothing here computes a model; every value is immutable and every operation returns a
new one, so that a window can be checkpointed, forked or replayed without copies by hand.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self
from uuid import uuid4

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Cache", "Memory", "Origin", "State"]

Layer = Tensor | tuple[Tensor, ...] | None  # what a block remembers: nothing, one tensor, or several
Rows = Tensor | Sequence[int] | slice
Storage = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Says who wrote a memory, from how much, and what it descends from.

    Raises:
        ValueError: for a field of another type: what is here goes into files.
    """

    id: str = field(default_factory=lambda: uuid4().hex)
    """Names a line of reading; only a fork or a merge begins a new one."""
    parents: tuple[str, ...] = ()
    """Ids of what it was forked or merged from."""
    model: str | None = None
    """Fingerprint of the model that wrote it; None: unknown."""
    tokens: int = 0
    """Tokens read."""
    sleeps: int = 0
    """Sleeps."""
    passes: int | None = None
    """Passes N of a sleep."""
    method: str | None = None
    """Name of the consolidator that wrote it (`SleepConfig.method`); None: unknown."""
    rule: tuple[str | None, ...] = ()
    """Kind of each block with fast weights (gated_delta_net, ...), None for one without; empty: unknown."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Whatever the user wants to remember."""

    def __post_init__(self) -> None:
        if not isinstance(self.tags, Mapping):
            raise ValueError(f"tags must map texts to texts, got {self.tags!r:.80}")
        object.__setattr__(self, "tags", dict(self.tags))  # the caller may write into theirs later
        for key, value in self.tags.items():
            if not (_is_text(key) and _is_text(value)):
                raise ValueError(f"tags must map texts to texts, got {key!r:.80}: {value!r:.80}")
        for name in ("parents", "rule"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name} of a memory must be a tuple, got {getattr(self, name)!r:.80}")
        known = (self.model, self.method, *self.rule)
        texts = [self.id, *self.parents, *(t for t in known if t is not None)]
        counts = {"tokens": self.tokens, "sleeps": self.sleeps}
        if self.passes is not None:
            counts["passes"] = self.passes
        if strange := [text for text in texts if not _is_text(text)]:
            raise ValueError(
                f"id, parents, model, method and rule of a memory must be text, got {strange[0]!r:.80}"
            )
        for name, number in counts.items():
            # By its type, since True is an int to isinstance.
            if type(number) is not int or number < 0:
                raise ValueError(f"{name} of a memory must be a count, got {number!r:.80}")

    def child(self, *others: "Origin") -> Self:
        """Return the origin of a fork, or of a merge with `others`."""
        return replace(self, id=uuid4().hex, parents=(self.id, *(other.id for other in others)))


def _is_text(value: object) -> bool:
    """Say whether a value is text that can be written: half of a pair of surrogates cannot."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


class _Carries(Protocol):
    @property
    def memory(self) -> "Memory": ...


class Starts(Protocol):
    """A model as a memory needs it: `initial_state` tells the layout of its fast weights."""

    def initial_state(self, batch_size: int) -> _Carries:
        """Return `S = 0`, for `batch_size` rows."""
        ...


@dataclass(frozen=True, eq=False)
class Memory:
    """The fast weights: all that crosses a window under hard eviction.

    Attributes:
        layers: one entry per block: None for a block without fast weights (attention), its tensor, or a tuple
            of them for a block that keeps several, `[B, ...]` each and of any shape. Most keep one matrix per
            head, `S` `[B, H, K, V]` (heads, key size, value size), in float32 or float64. A tuple of one
            tensor is stored as that tensor, an empty one as None.
        origin: who wrote the values and from what; None as long as nobody asked. A memory out of a session or
            a file has it, and so have its copies: `map`, `clone`, `to`, rows, `fork` and `merge` hand it on.
    """

    layers: tuple[Layer, ...]
    origin: Origin | None = None

    def __post_init__(self) -> None:
        # A frozen dataclass refuses plain assignment, to itself too.
        object.__setattr__(self, "layers", tuple(_layer(_parts(layer)) for layer in self.layers))

    @classmethod
    def zeros(
        cls,
        shapes: Iterable[Sequence[int] | Sequence[Sequence[int]] | None],
        batch_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Return `S = 0`, as every sequence begins (Algorithm 1).

        Args:
            shapes: for each block the shape of its tensor without the rows, such as `(H, K, V)`; a sequence
                of shapes for a block that keeps several; None for one that keeps none.
            batch_size: B.
            dtype: of all tensors.
            device: of all tensors.
        """

        def zero(shape: Any) -> Layer:
            if shape is None:
                return None
            if all(isinstance(size, int) for size in shape):  # one tensor; a scalar per row has the shape ()
                return torch.zeros(batch_size, *shape, dtype=dtype, device=device)
            return tuple(torch.zeros(batch_size, *each, dtype=dtype, device=device) for each in shape)

        return cls(tuple(map(zero, shapes)))

    @property
    def parts(self) -> tuple[tuple[Tensor, ...], ...]:
        """Return `layers` with a tuple of tensors for every block: none, one or several."""
        return tuple(map(_parts, self.layers))

    @property
    def S(self) -> tuple[Tensor | None, ...]:
        """Return each block's first tensor `[B, H, K, V]`, a matrix per head; None where there is none."""
        # Four dimensions are all that tells a matrix per head from what else a block may keep.
        return tuple(next((t for t in part if t.ndim == 4), None) for part in self.parts)

    @property
    def writes(self) -> tuple[bool, ...]:
        """Tell for each block if it has fast weights."""
        return tuple(layer is not None for layer in self.layers)

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over all tensors, block by block."""
        return (t for part in self.parts for t in part)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Return a memory with `fn` applied to every tensor, in the order of `tensors()`."""
        return replace(self, layers=tuple(tuple(fn(t) for t in part) for part in self.parts))

    def detach(self) -> Self:
        """Return the same values, cut from the autograd graph; they share their storage."""
        return self.map(Tensor.detach)

    def clone(self) -> Self:
        """Return an independent copy (a snapshot)."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the same memory on another device or in another dtype."""
        return self.map(lambda s: s.to(device=device, dtype=dtype))

    def __getitem__(self, rows: Rows) -> Self:
        """Return rows of the batch: a slice, a list or index tensor (repeats fork a row), or a bool mask."""
        return self.map(lambda s: s[rows])

    @property
    def batch_size(self) -> int:
        """Count the rows of the batch (0 if no block has fast weights)."""
        return next((t.shape[0] for t in self.tensors()), 0)

    @property
    def nbytes(self) -> int:
        """Count the bytes of all fast weights, all rows."""
        return sum(t.nbytes for t in self.tensors())

    def norms(self) -> Tensor:
        """Return the Frobenius norm of `S` per row, block that has one, and head: `[B, blocks, H]`.

        Raises:
            ValueError: if there is no `S` (a matrix per head), or the blocks differ in their number of heads.
        """
        return self._per_head(torch.linalg.matrix_norm)

    def effective_rank(self) -> Tensor:
        """Return the effective rank of `S` per row, block that has one, and head: `[B, blocks, H]`.

        The exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007): between 1
        and min(K, V), and 0 where `S = 0`.

        Raises:
            ValueError: as `norms`.
        """

        def rank(s: Tensor) -> Tensor:
            values = torch.linalg.svdvals(s)
            total = values.sum(-1, keepdim=True)
            # `S = 0` would divide by zero; what comes of it has rank 1, which the factor below makes 0.
            share = values / total.clamp(min=torch.finfo(values.dtype).tiny)
            return torch.special.entr(share).sum(-1).exp() * (total[..., 0] > 0)

        return self._per_head(rank)

    def _per_head(self, figure: Callable[[Tensor], Tensor]) -> Tensor:
        figures = [figure(s) for s in self.S if s is not None]
        if len({f.shape for f in figures}) != 1:
            raise ValueError("norms and ranks need at least one block, all with the same number of heads")
        return torch.stack(figures, dim=1)

    def like(self, template: "Memory", name: object = "memory") -> Self:
        """Return the memory on the devices and in the dtypes of `template`, of the same layout and any rows.

        Raises:
            ValueError: if the layout is another one.
        """
        shapes, wanted = self._shapes(), template._shapes()
        if shapes != wanted:
            raise ValueError(f"{name} has fast weights {shapes}, the model {wanted}")
        # `map` goes through the tensors in this order, so each meets its counterpart.
        place = iter([(t.device, t.dtype) for t in template.tensors()])
        return self.map(lambda t: t.to(*next(place)))

    def _shapes(self) -> list[list[tuple[int, ...]]]:
        return [[tuple(t.shape[1:]) for t in part] for part in self.parts]

    def diff(self, other: "Memory") -> Self:
        """Return what this memory holds and `other` does not: the difference of their fast weights.

        Raises:
            ValueError: if the two have not the same layout.
        """
        return self._combined([other], [1.0, -1.0])

    def merge(self, others: Sequence["Memory"], weights: Sequence[float] | None = None) -> Self:
        """Return the weighted sum of this memory and `others`; weights default to equal shares of 1.

        Whether the sum remembers what its parts did depends on the task: see docs/sessions.md.

        Raises:
            ValueError: if layouts, models, methods or the number of weights do not agree.
        """
        weights = [1 / (1 + len(others))] * (1 + len(others)) if weights is None else weights
        if len(weights) != 1 + len(others):
            raise ValueError(f"weights must be {1 + len(others)}, one a memory, got {len(weights)}")
        everyone: tuple[Memory, ...] = (self, *others)
        origins = [m.origin for m in everyone if m.origin is not None]
        # An unknown model (None) may be any other one, so it is not merged with a known one.
        if len({origin.model for origin in origins}) > 1:
            raise ValueError("memories of different models cannot be merged")
        # What no sleep has written is any method's.
        methods = sorted({o.method for o in origins if o.sleeps and o.method is not None})
        if len(methods) > 1:
            raise ValueError(
                f"memories that {' and '.join(methods)} wrote cannot be merged: name those of one method"
            )
        merged = self._combined(others, weights)
        # With one parent unknown the counts and parents of the sum would be wrong: it gets no origin.
        if self.origin is None or len(origins) <= len(others):
            return merged
        origin = replace(
            self.origin.child(*origins[1:]),
            tokens=sum(o.tokens for o in origins),
            sleeps=sum(o.sleeps for o in origins),
            method=next(iter(methods), self.origin.method),
        )
        return replace(merged, origin=origin)

    def _combined(self, others: Sequence["Memory"], weights: Sequence[float]) -> Self:
        everyone: tuple[Memory, ...] = (self, *others)
        parts = [m.parts for m in everyone]
        # Rows count too: sums would broadcast one row over many without a word.
        if len({tuple(tuple(t.shape for t in part) for part in each) for each in parts}) > 1:
            raise ValueError("memories must have the same blocks, heads and rows")

        def total(tensors: Sequence[Tensor]) -> Tensor:
            terms = [w * t for w, t in zip(weights, tensors, strict=True)]
            return sum(terms[1:], terms[0])  # not from 0, which would be one more tensor

        # Computed values were written by nobody: no origin is handed on.
        blocks = zip(*parts, strict=True)
        return type(self)(tuple(tuple(map(total, zip(*block, strict=True))) for block in blocks))

    def fork(self) -> Self:
        """Return the same fast weights with an id of their own, whose parent is this one.

        Raises:
            ValueError: if the memory has no origin.
        """
        if self.origin is None:
            raise ValueError("this memory has no origin to descend from; take it from a session or a file")
        return replace(self, origin=self.origin.child())

    # The way to a file and back. Values know no files: who does is found by name when it is asked.

    def save(
        self,
        path: str | Path,
        model: Starts | None = None,
        *,
        storage: Storage | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write the memory to a file, atomically; docs/sessions.md describes the format.

        Args:
            path: file, replaced if there is one.
            model: whose fast weights these are; not needed for a memory out of a session or a file.
            storage: dtype in the file: float32, bfloat16 or int8; None: as it is.
            tags: added to those it has.

        Raises:
            ValueError: without a model to tie it to, or if it holds NaN or infinity.
            OSError: if the file cannot be written; an old one is untouched.
        """
        import_module(_FILES).save(self, path, model, storage=storage, tags=tags)

    @staticmethod
    def load(path: str | Path, model: Starts | None = None) -> "Memory":
        """Read a memory from a file, for `model`, or without one only to look at it.

        Of a session that was saved within a window this is what its last sleep left; `origin.tokens` counts
        those before the window.

        Raises:
            ValueError: for a file that is foreign, truncated, edited, of a newer version or another model's.
            OSError: if there is no such file.
        """
        memory: Memory = import_module(_FILES).load(path, model)
        return memory

    @staticmethod
    def log(path: str | Path) -> "list[tuple[Path | None, Origin]]":
        """List a memory file and all that it descends from, as far as it lies in its folder, youngest first.

        Raises:
            ValueError: as `load`.
            OSError: if there is no such file.
        """
        return list(import_module(_FILES).log(path))


# A name and no import: `lmsleep.memory` imports this module.
_FILES = "lmsleep.memory.saved"


def _parts(layer: Layer) -> tuple[Tensor, ...]:
    """Return the tensors of a block: none, one or several."""
    if layer is None:
        return ()
    return (layer,) if isinstance(layer, Tensor) else tuple(layer)


def _layer(parts: tuple[Tensor, ...]) -> Layer:
    """Invert `_parts`: no tensor is None and a single one stands alone, so each layout has one form."""
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else parts


ABSENT = -1e4  # added to a score it leaves no attention, in any dtype


@dataclass(frozen=True, eq=False)
class Cache:
    """The working memory of the current window: keys and values, and tails of short convolutions.

    Attributes:
        layers: one tuple of tensors per block, each `[B, t, ...]` with time as dimension 1: the
            (unrotated) keys and values of an attention block, the last inputs of a short
            convolution; an empty tuple where a block needs neither.
        filled: `[B]` int64, how many of the newest positions of each row are tokens; what is older is
            padding, zeros. None: all are tokens.
        kept: what compaction kept of earlier windows, one tuple per block, empty for a block without
            attention: keys `[B, k, H, K]` as attention sees them where the window begins at position 0,
            values `[B, k, H, V]`, float32 `[B, k, H]` that is added to the scores (`ABSENT`: no key, but
            padding), int32 `[B, k, H]`, how far before the window each key stands, and float32 `[B, k, H]`,
            by which keys are chosen again. `()`: nothing.
    """

    layers: tuple[tuple[Tensor, ...], ...]
    filled: Tensor | None = None
    kept: tuple[tuple[Tensor, ...], ...] = ()

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Return a cache with `fn` applied to every tensor of its layers and of `kept`; `filled` stays."""
        layers, kept = (tuple(tuple(fn(t) for t in layer) for layer in x) for x in (self.layers, self.kept))
        return replace(self, layers=layers, kept=kept)

    @property
    def length(self) -> int:
        """Count the positions of the longest tensor, padding included."""
        # Tails of convolutions are shorter than keys and values; all end at the newest token.
        return max((t.shape[1] for layer in self.layers for t in layer), default=0)

    def counts(self, batch_size: int) -> Tensor:
        """Return `[B]` int64: how many tokens each of `batch_size` rows holds."""
        if self.filled is not None:
            return self.filled
        device = next((t.device for layer in self.layers for t in layer), None)
        return torch.full((batch_size,), self.length, device=device)

    def last(self, tokens: int) -> Self:
        """Return what is left after eviction down to the newest `tokens` positions (0: nothing)."""
        return replace(self.newest(tokens), kept=())

    def newest(self, tokens: int) -> Self:
        """Return the newest `tokens` positions of the window, and all that is kept of earlier ones."""
        if tokens == 0:  # of what is evicted neither memory nor graph stays alive
            return self._cut(lambda t: t.new_empty(len(t), 0, *t.shape[2:]), None)
        # A tensor with fewer positions than that stays whole; padding is older, so it goes first.
        filled = None if self.filled is None else self.filled.clamp(max=tokens)
        return self._cut(lambda t: t[:, max(t.shape[1] - tokens, 0) :], filled)

    def _cut(self, cut: Callable[[Tensor], Tensor], filled: Tensor | None) -> Self:
        """Return a cache with every tensor of its layers cut, and `filled`."""
        return replace(self, layers=tuple(tuple(map(cut, layer)) for layer in self.layers), filled=filled)

    def keep(self, counts: Tensor) -> Self:
        """Keep the newest `counts[b]` positions of row b; older ones are padding, or go if all rows agree."""
        # No row can keep more tokens than it has: what is older in it is padding already.
        counts = counts if self.filled is None else torch.minimum(counts, self.filled)
        kept = replace(self.newest(int(counts.max())), filled=None)
        if bool((counts >= kept.length).all()):
            return kept

        def blanked(t: Tensor) -> Tensor:
            # Counted from the newest position (age 0), at which tensors of any length are aligned. Zeros,
            # because convolutions read padding as inputs before the first token.
            age = torch.arange(t.shape[1] - 1, -1, -1, device=t.device)
            return t.masked_fill((age >= counts[:, None]).view(*t.shape[:2], *[1] * (t.ndim - 2)), 0)

        return kept._cut(blanked, counts)

    def holding(self, counts: Tensor) -> Self:
        """Say that row b holds `counts[b]` tokens, all older positions being padding, zeros, already."""
        longest = int(counts.max())
        # Nothing is blanked and, as a rule, nothing cut: the tensors stay what they are, uncopied.
        cut = self if longest >= self.length else replace(self, filled=None).newest(longest)
        return replace(cut, filled=None if bool((counts >= cut.length).all()) else counts)

    def detach(self) -> Self:
        """Return the same values, cut from the autograd graph."""
        return self.map(Tensor.detach)

    def __getitem__(self, rows: Rows) -> Self:
        """Return rows of the batch, as for `Memory`."""
        return replace(self.map(lambda t: t[rows]), filled=None if self.filled is None else self.filled[rows])

    @property
    def nbytes(self) -> int:
        """Count the bytes of all cached tensors, all rows, padding included."""
        return sum(t.nbytes for layer in (*self.layers, *self.kept) for t in layer)


class State(NamedTuple):
    """All that blocks carry from token to token: fast weights and working memory."""

    memory: Memory
    cache: Cache

    @property
    def batch_size(self) -> int:
        """Count the rows of the batch (0 if it carries nothing)."""
        return next((t.shape[0] for t in self.tensors()), 0)

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over the tensors of both, the memory first."""
        yield from self.memory.tensors()
        for layer in (*self.cache.layers, *self.cache.kept):
            yield from layer

    def rows(self, rows: Rows) -> "State":
        """Return rows of the batch."""
        return State(self.memory[rows], self.cache[rows])

    def detach(self) -> "State":
        """Return the same values, cut from the autograd graph."""
        return State(self.memory.detach(), self.cache.detach())

    def replace(self, start: int, blocks: Sequence[tuple[Layer, tuple[Tensor, ...]]]) -> "State":
        """Return the state with blocks `start, start + 1, ...` replaced by new (fast weights, cache)."""
        # The cache keeps its old `filled`, that of the beginning; `counted` brings it up to date.
        stop = start + len(blocks)
        memory, cache = self.memory.layers, self.cache.layers
        return State(
            Memory((*memory[:start], *(s for s, _ in blocks), *memory[stop:])),
            replace(self.cache, layers=cache[:start] + tuple(c for _, c in blocks) + cache[stop:]),
        )

    def views(self) -> "list[State]":
        """Return the rows, each as a batch of one without padding, in the storage of this state."""
        single = [self.rows(slice(row, row + 1)) for row in range(self.batch_size)]
        counts = self.cache.counts(self.batch_size).tolist()
        return [
            State(s.memory, replace(s.cache.newest(count), filled=None))
            for s, count in zip(single, counts, strict=True)
        ]

    def split(self) -> "list[State]":
        """Return the rows, each as a batch of one without padding; they share no storage."""
        # A view of one row would keep the whole batch alive.
        return [state.clone() for state in self.views()]

    def clone(self) -> "State":
        """Return an independent copy."""
        return State(self.memory.clone(), self.cache.map(Tensor.clone))

    def counted(self, began: Cache, tokens: int, valid: Tensor | None) -> "State":
        """Return this state after a window of `tokens` with a count of the filled positions of each row.

        Args:
            began: the working memory that the window began with.
            tokens: T, padding included.
            valid: `[B, T]` bool, False for padding; None: there is none.
        """
        if valid is None and began.filled is None:
            return self
        counts = began.counts(self.batch_size) + (tokens if valid is None else valid.sum(dim=1))
        return State(self.memory, self.cache.holding(counts))

    @staticmethod
    def join(parts: Sequence["State"], order: Tensor | None = None) -> "State":
        """Concatenate the rows of `parts`, and take rows `order` of the result (default: all, in order).

        Working memories of different length get padding before their first position.
        """

        def joined(tensors: Sequence[Tensor]) -> Tensor:
            rows = torch.cat(list(tensors))
            return rows if order is None else rows[order]

        def aligned(tensors: Sequence[Tensor], fill: float = 0) -> Tensor:
            longest = max(t.shape[1] for t in tensors)
            # F.pad counts dimensions from the last; the pair that ends up last is that of time, dimension 1.
            # It goes before the first position. Rows that need none are not copied for it.
            padding = [(0, 0) * (t.ndim - 2) + (longest - t.shape[1], 0) for t in tensors]
            pairs = zip(tensors, padding, strict=True)
            return joined([F.pad(t, p, value=fill) if p[-2] else t for t, p in pairs])

        if len(parts) == 1 and order is None:
            return parts[0]
        memory = tuple(
            tuple(joined(ts) for ts in zip(*blocks, strict=True))
            for blocks in zip(*(p.memory.parts for p in parts), strict=True)
        )
        cache = Cache(
            tuple(
                tuple(aligned(ts) for ts in zip(*layers, strict=True))
                for layers in zip(*(p.cache.layers for p in parts), strict=True)
            )
        )
        if any(p.cache.kept for p in parts):
            cache = replace(cache, kept=_joined_kept([p.cache for p in parts], aligned))
        # Only then is there padding; without it `filled` stays None, and no mask of padding is needed.
        if len({p.cache.length for p in parts}) > 1 or any(p.cache.filled is not None for p in parts):
            cache = cache.holding(joined([p.cache.counts(p.batch_size) for p in parts]))
        return State(Memory(memory), cache)


def _joined_kept(
    caches: Sequence[Cache], aligned: Callable[[Sequence[Tensor], float], Tensor]
) -> tuple[tuple[Tensor, ...], ...]:
    """Return what all of `caches` keep, by `aligned`; rows that keep less get keys that nobody sees."""
    like = next(c.kept for c in caches if c.kept)

    def of(cache: Cache, i: int, j: int) -> Tensor:
        if cache.kept:
            return cache.kept[i][j]
        rows = next(len(t) for layer in cache.layers for t in layer)
        return like[i][j].new_empty(rows, 0, *like[i][j].shape[2:])

    fills = 0, 0, ABSENT, 0, 0  # of keys, values, bias, age and worth
    return tuple(
        tuple(aligned([of(c, i, j) for c in caches], fills[j]) for j in range(len(layer)))
        for i, layer in enumerate(like)
    )
