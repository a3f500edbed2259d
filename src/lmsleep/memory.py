"""The fast weights as a value, with what can be asked of them and their way to a file and back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from lmsleep import memory_file
from lmsleep.memory_file import Origin

Rows = Tensor | Sequence[int] | slice


class _Carries(Protocol):
    @property
    def memory(self) -> "Memory": ...


class Starts(Protocol):
    """What a memory needs of a model: the layout of its fast weights, those of `initial_state`."""

    def initial_state(self, batch_size: int) -> _Carries:
        """`S = 0`, for `batch_size` rows."""
        ...


@dataclass(frozen=True, eq=False)
class Memory:
    """The fast weights `S`: all that crosses a window under hard eviction.

    Attributes:
        layers: one entry per block: a tensor `[B, H, K, V]` (heads, key size, value size), float32
            or float64, for a block with fast weights, `None` for a block without (attention).
        origin: who wrote the values and from what; None as long as nobody asked. A memory out of a session or
            a file has it, and so have its copies: `map`, `clone`, `to`, rows, `fork` and `merge` hand it on.
    """

    layers: tuple[Tensor | None, ...]
    origin: Origin | None = None

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
        return replace(self, layers=tuple(None if s is None else fn(s) for s in self.layers))

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
        return self._per_head(torch.linalg.matrix_norm)

    def effective_rank(self) -> Tensor:
        """Effective rank of `S` per row, block with fast weights, and head: `[B, blocks, H]`.

        The exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007): between 1
        and min(K, V), and 0 where `S = 0`.

        Raises:
            ValueError: if the blocks differ in their number of heads.
        """

        def rank(s: Tensor) -> Tensor:
            values = torch.linalg.svdvals(s)
            total = values.sum(-1, keepdim=True)
            share = values / total.clamp(min=torch.finfo(values.dtype).tiny)
            return torch.special.entr(share).sum(-1).exp() * (total[..., 0] > 0)

        return self._per_head(rank)

    def _per_head(self, figure: Callable[[Tensor], Tensor]) -> Tensor:
        figures = [figure(s) for s in self.layers if s is not None]
        if len({f.shape for f in figures}) != 1:
            raise ValueError("norms and ranks need at least one block, all with the same number of heads")
        return torch.stack(figures, dim=1)

    def diff(self, other: "Memory") -> Self:
        """What this memory holds and `other` does not: the difference of their fast weights.

        Raises:
            ValueError: if the two have not the same layout.
        """
        return self._combined([other], [1.0, -1.0])

    def merge(self, others: Sequence["Memory"], weights: Sequence[float] | None = None) -> Self:
        """The weighted sum of this memory and `others`; weights default to equal shares of 1.

        Whether the sum remembers what its parts did depends on the task: see docs/sessions.md.

        Raises:
            ValueError: if layouts, models or the number of weights do not agree.
        """
        weights = [1 / (1 + len(others))] * (1 + len(others)) if weights is None else weights
        if len(weights) != 1 + len(others):
            raise ValueError(f"weights must be {1 + len(others)}, one a memory, got {len(weights)}")
        everyone: tuple[Memory, ...] = (self, *others)
        origins = [m.origin for m in everyone if m.origin is not None]
        if len({origin.model for origin in origins}) > 1:
            raise ValueError("memories of different models cannot be merged")
        merged = self._combined(others, weights)
        if self.origin is None or len(origins) <= len(others):
            return merged
        origin = replace(
            self.origin.child(*origins[1:]),
            tokens=sum(o.tokens for o in origins),
            sleeps=sum(o.sleeps for o in origins),
        )
        return replace(merged, origin=origin)

    def _combined(self, others: Sequence["Memory"], weights: Sequence[float]) -> Self:
        memories: tuple[Memory, ...] = (self, *others)
        if len({tuple(None if s is None else s.shape for s in m.layers) for m in memories}) > 1:
            raise ValueError("memories must have the same blocks, heads and rows")

        def total(layer: Sequence[Tensor | None]) -> Tensor | None:
            terms = [w * s for w, s in zip(weights, layer, strict=True) if s is not None]
            return sum(terms[1:], terms[0]) if terms else None

        return type(self)(tuple(map(total, zip(*(m.layers for m in memories), strict=True))))

    def fork(self) -> Self:
        """The same fast weights with an id of their own, whose parent is this one.

        Raises:
            ValueError: if the memory has no origin.
        """
        if self.origin is None:
            raise ValueError("this memory has no origin to descend from; take it from a session or a file")
        return replace(self, origin=self.origin.child())

    def save(
        self,
        path: str | Path,
        model: Starts | None = None,
        *,
        storage: memory_file.Storage | None = None,
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
        if model is not None:
            origin = replace(self.origin or Origin(), model=memory_file.fingerprint(model))
        elif self.origin is None or self.origin.model is None:
            raise ValueError("this memory does not know its model; pass model=")
        else:
            origin = self.origin
        header = replace(origin, tags={**origin.tags, **(tags or {})}).to_dict()
        memory_file.write(
            Path(path), memory_file.pack(self.layers, storage), {**header, "blocks": len(self.layers)}
        )

    @classmethod
    def load(cls, path: str | Path, model: Starts | None = None) -> Self:
        """Read a memory from a file, for `model`, or without one only to look at it.

        Of a session that was saved within a window this is what its last sleep left; `origin.tokens` counts
        those before the window.

        Raises:
            ValueError: for a file that is foreign, truncated, edited, of a newer version or another model's.
            OSError: if there is no such file.
        """
        tensors, header = memory_file.read(Path(path))
        return cls.unpacked(Path(path), tensors, header, model)

    @classmethod
    def unpacked(
        cls, path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], model: Starts | None
    ) -> Self:
        """The memory in what `memory_file.read` returned; arguments and errors as for `load`."""
        try:
            origin = Origin.from_dict(header)
            window = len(tensors.get("window", ()))
            if window > origin.tokens:
                raise ValueError(f"its open window has {window} tokens, and it read {origin.tokens}")
            origin = replace(origin, tokens=origin.tokens - window)
            memory = cls(memory_file.unpack(tensors, header["blocks"]), origin)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"{path} is no memory: {error}") from None
        if model is None:
            return memory
        if origin.model != memory_file.fingerprint(model):
            raise ValueError(f"{path} is the memory of another model (or of other weights of this one)")
        return replace(memory.like(model.initial_state(1).memory, path), origin=origin)

    def like(self, template: "Memory", name: object = "memory") -> Self:
        """The memory on the device and in the dtype of `template`, which has its layout and any rows.

        Raises:
            ValueError: if the layout is another one.
        """
        shapes, wanted = ([None if s is None else s.shape[1:] for s in m.layers] for m in (self, template))
        if shapes != wanted:
            raise ValueError(f"{name} has fast weights {shapes}, the model {wanted}")
        kind = next((s for s in template.layers if s is not None), None)
        return self if kind is None else self.to(kind.device, kind.dtype)

    @staticmethod
    def log(path: str | Path) -> "list[tuple[Path | None, Origin]]":
        """A memory file and all that it descends from, as far as it lies in the same folder, youngest first.

        Raises:
            ValueError: as `load`.
            OSError: if there is no such file.
        """
        return list(memory_file.log(Path(path)))
