"""Bytes that a computation holds: tensors that are alive, and those that autograd keeps."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], object]) -> int:
    """Measure the most bytes of tensors that were alive at once among those that the call makes."""
    with Alive() as alive:
        call()
    return alive.most


class Alive(TorchDispatchMode):
    """A mode that counts the bytes of every storage from the operation that makes it until it is freed.

    Attributes:
        now: bytes that are alive.
        most: bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it makes."""
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in given:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, storage: int, nbytes: int) -> None:
        self._known.discard(storage)
        self.now -= nbytes


@dataclass
class Kept:
    """Bytes that autograd was given to keep."""

    total: int = 0


@contextmanager
def kept_bytes(besides: Iterable[Tensor] = ()) -> Iterator[Kept]:
    """Count the bytes of all storages that autograd keeps of what runs within, without those `besides`."""
    known, kept = {t.untyped_storage()._cdata for t in besides}, Kept()

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        # What is kept stays alive until its backward pass, so that no other one comes to lie at its address.
        if storage._cdata not in known:
            known.add(storage._cdata)
            kept.total += storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept
