"""Times of calls that take turns, FLOPs and bytes: what every benchmark of speed is made of."""

import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Case = TypeVar("Case", bound=Hashable)


@dataclass
class Times:
    """Repeated measurements, in seconds: on the wall, and of the CPU, which neighbours slow less."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, call: Callable[[], object], times: int = 1) -> None:
        """Measure one call of something that does a thing `times` times."""
        _finish()
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        _finish()
        self.cpu.append((time.process_time() - cpu) / times)
        self.wall.append((time.perf_counter() - wall) / times)


def _finish() -> None:
    """Wait until a GPU, if one is in use, has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def take_turns(calls: Mapping[Case, Callable[[], object]], repeats: int) -> dict[Case, Times]:
    """Measure all calls `repeats` times, A B A B, so that they share drift; a first round is not counted."""
    times = {case: Times() for case in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for case, call in calls.items():
            times[case].add(call)
    return times


def ms(seconds: list[float], percentile: float = 50) -> float:
    """Return a percentile in milliseconds."""
    return float(np.percentile(seconds, percentile)) * 1e3


def ratio(times: list[float], base: list[float]) -> str:
    """Compare times that took turns: median [10th ... 90th percentile] of the ratio."""
    low, median, high = np.percentile(np.array(times) / np.array(base), (10, 50, 90))
    return f"{median:.2f} [{low:.2f} ... {high:.2f}]"


def flops(call: Callable[[], object]) -> int:
    """Count the FLOPs of the matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_bytes(call: Callable[[], object]) -> int:
    """Measure the most bytes of tensors that were alive at once among those that the call makes."""
    with _Alive() as alive:
        call()
    return alive.most


class _Alive(TorchDispatchMode):
    """A mode that counts the bytes of every storage from the operation that makes it until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
