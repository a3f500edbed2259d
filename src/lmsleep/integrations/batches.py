"""Answer requests some at a time: as many as fit."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lmsleep.progress import progress as bar_of

MOST = 64  # where `auto` begins, as in lm-eval's other model types


class Batches:
    """Says how many requests are answered together.

    Args:
        size: a number, or "auto": as many as `most`, and half as many whenever the device has no memory left.
            lm-eval's "auto:N" (look N times) is the same: it is looked whenever that happens.
        most: where "auto" begins.
        progress: show a bar, on a terminal.

    Raises:
        ValueError: for a size that is neither.
    """

    def __init__(self, size: int | str = 1, *, most: int = MOST, progress: bool = False) -> None:
        self.adapts = re.fullmatch(r"auto(:\d+)?", str(size)) is not None
        for name, given in {"max_batch_size": most, **({} if self.adapts else {"batch_size": size})}.items():
            if not re.fullmatch(r"0*[1-9]\d*", str(given)):
                auto = ", or auto" if name == "batch_size" else ""
                raise ValueError(f"{name} must be a whole number from 1{auto}, got {given}")
        self.size, self.progress = int(most if self.adapts else size), progress

    def answered(
        self, items: Sequence[Any], what: str, answer: Callable[[Sequence[Any]], list[Any]]
    ) -> list[Any]:
        """Return what `answer` makes of some items at a time, all together; `what` stands at the bar.

        Raises:
            torch.OutOfMemoryError: where one item does not fit, or the size is a number.
        """
        found: list[Any] = []
        done = 0
        with bar_of(show=self.progress, total=len(items), desc=what, leave=False) as bar:
            while done < len(items):
                some = items[done : done + self.size]
                try:
                    found += answer(some)
                except torch.OutOfMemoryError:
                    if not self.adapts or len(some) == 1:
                        raise
                    self.size = len(some) // 2
                    continue
                done += len(some)
                bar.update(len(some))
        return found
