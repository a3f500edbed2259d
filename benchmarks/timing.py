"""Times of calls that take turns, and FLOPs: what every benchmark of speed is made of."""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

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
